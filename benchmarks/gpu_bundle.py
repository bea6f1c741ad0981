"""Packs what `make check-gpu` needs on a machine without a network: `make gpu-bundle` writes build/gpu-bundle.tar.gz.

The archive contains the benchmarks, a small store with its tokenizer, and wheels of tinyllama, of its requirements for
training, of transformers, of torchao and of liger-kernel. torch, numpy and triton come with the machine: they may be
installed for the system's Python or in a virtual environment. The wheels are for the processor architecture and the
Python version of this machine, unless --python names another version. On the machine, with the `python3` that imports
torch:

    tar xzf gpu-bundle.tar.gz && cd gpu-bundle
    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/site python3 benchmarks/gpu.py
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from gpu import ROOT, commit
from gpu_training import write_inputs

REQUIREMENTS = (
    "pydantic",
    "pyyaml",
    "safetensors",
    "tokenizers",
    "tyro",
    "rich",
    "sentencepiece",  # as protobuf, for recipes whose tokenizer is a tokenizer.model
    "protobuf",
)
PEERS = ("transformers",)
WITHOUT_REQUIREMENTS = ("torchao==0.17.0", "liger-kernel")  # torchao 0.18 cannot be imported with torch 2.9
PROVIDED = ("torch-", "numpy-", "nvidia_", "triton-")
"""Beginnings of the names of wheels that the machine provides."""
MAX_BYTES = 60_000_000


def main() -> None:
    """Write the archive. Raises SystemExit if it is larger than 60 MB."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "gpu-bundle"
        shutil.copytree(ROOT / "benchmarks", bundle / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
        (bundle / "commit.txt").write_text(commit())
        inputs = bundle / "benchmarks" / "gpu-inputs"
        inputs.mkdir()
        write_inputs(inputs)
        download_wheels(bundle / "wheels", arguments.python)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(arguments.out, "w:gz") as archive:
            archive.add(bundle, "gpu-bundle")
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        raise SystemExit(f"{arguments.out}: {size:,} bytes, more than {MAX_BYTES:,}")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu-bundle.tar.gz"), help="archive (default: %(default)s)"
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=version, help="Python of the machine (default: %(default)s)")
    return parser.parse_args()


def download_wheels(folder: Path, python: str) -> None:
    """Build tinyllama's wheel and download the others."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # otherwise the wheel also contains its deleted modules
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    download = [*pip, "download", "--dest", str(folder), "--only-binary", ":all:", "--python-version", python]
    subprocess.run([*download, *REQUIREMENTS, *PEERS], check=True)
    subprocess.run([*download, "--no-deps", *WITHOUT_REQUIREMENTS], check=True)
    for wheel in folder.iterdir():
        if wheel.name.startswith(PROVIDED):
            wheel.unlink()


if __name__ == "__main__":
    main()
