"""Versions of the peers in the benchmarks, and a virtual environment per peer, created once under --work.

Each environment is WORK/peers/NAME, with the torch of the current environment. litdata and nanochat use all
dependencies of the current environment, so that they and tinyllama use the same versions of libraries. Versions are
fixed, so that the results can be reproduced. To use a newer version, change this file.
"""

import subprocess
import sys
import sysconfig
import venv
from functools import cache
from importlib.metadata import version
from pathlib import Path

PEERS = {
    "litgpt": ("litgpt==0.5.13", "requests==2.34.2"),
    "transformers": ("transformers==5.15.1", "accelerate==1.15.0"),
    "torchtitan": ("torchtitan==0.3.0", "triton==3.9.0"),
    "litdata": (
        *("litdata==0.2.76", "lightning-utilities==0.15.3", "obstore==0.12.1", "tifffile==2026.3.3"),
        *("boto3==1.44.8", "botocore==1.44.8", "jmespath==1.1.0", "s3transfer==0.19.3"),
    ),
    "deduplication": (
        *("datatrove==0.10.1", "spacy==3.8.18", "regex==2026.11.19", "orjson==3.13.0", "zstandard==0.25.0"),
        "tokenizers==0.23.3",
        *("text-dedup==0.4.0", "rensa==0.5.0", "marin-dupekit==0.1.1"),
    ),
    "nanochat": ("rustbpe==0.1.0", "tiktoken==0.14.0"),
}
SOURCES = {"nanochat": ("https://github.com/karpathy/nanochat", "92d63d4e8bb4df75c3b71618f31ddde2378b2bcd")}
"""Repository and commit of the peers that are not a package."""
BORROWING = {"litdata", "nanochat"}
"""Peers installed without their dependencies, which the current environment contains."""
WITHOUT_TORCH = {"deduplication"}


def make_peer(work: Path, name: str) -> Path:
    """Return the Python of a peer's environment; create the environment if it does not exist."""
    folder = work / "peers" / name
    python, ready = folder / "bin" / "python", folder / "ready"
    torch = f"torch=={version('torch').partition('+')[0]}"
    wanted = "\n".join((torch, *PEERS[name], *SOURCES.get(name, ())))
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        if name in BORROWING:
            pip(python, "install", "--no-deps", *PEERS[name])
            (packages_of(python) / "present.pth").write_text(sysconfig.get_path("purelib"))
        else:
            constraints = work / "peers" / "constraints.txt"
            constraints.write_text(f"{torch}\n")
            required = PEERS[name] if name in WITHOUT_TORCH else (torch, *PEERS[name])
            pip(python, "install", "-c", constraints, *required)
        if name in SOURCES:
            clone(*SOURCES[name], folder / "source")
            (packages_of(python) / "source.pth").write_text(str(folder / "source"))
        ready.write_text(wanted)
    return python


def clone(repository: str, commit: str, folder: Path) -> None:
    """Write the files of a commit to a folder."""
    subprocess.run(["git", "clone", "--quiet", "--no-checkout", repository, folder], check=True)
    subprocess.run(["git", "-C", folder, "checkout", "--quiet", "--detach", commit], check=True)


def packages_of(python: Path) -> Path:
    """Return the site-packages of an environment."""
    (folder,) = python.parent.parent.glob("lib/python*/site-packages")
    return folder


def pip(python: str | Path, *arguments: str | Path) -> None:
    """Run pip with a Python."""
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


@cache
def version_of(python: str | Path, package: str) -> str:
    """Return a package's version in the Python that runs it, or the commit of a peer that is not a package."""
    if package in SOURCES:
        return f"commit {SOURCES[package][1][:7]}"
    command = [python, "-c", f"from importlib.metadata import version; print(version({package!r}))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
