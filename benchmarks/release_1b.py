"""Measurement of a release of the 1.1B model in every format: file sizes, and the memory and time to write the files.

The model has the shape of the recipe tinyllama-1.1b with random weights. Its tokenizer has 32,000 tokens and is trained
on the standard library's text. The script runs the steps of `tinyllama release`: it computes the reference outputs,
writes the Hugging Face folder, and converts this folder to GGUF and CTranslate2 without the model in memory. The exit
status is 1 if Q4_K_M is 700 MB or more (637 MB in the original release), if the bf16 folder is not 2.2 GB, or if the
memory of the process grew by more than the float32 weights, one shard and the largest matrix in float32. --verify also
runs each format in its engine.

    python benchmarks/release_1b.py
"""

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measuring import DEFAULT_WORK
from training_setup import make_work

from tinyllama.files import write_json
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Recipe
from tinyllama.release.formats import write_formats
from tinyllama.release.metadata import hash_files
from tinyllama.release.release import write_hugging_face
from tinyllama.release.verify import compute_reference_outputs, format_checks, verify_release
from tinyllama.tokenizer import Tokenizer

NAME = "tinyllama-1.1b"


def main() -> None:
    """Write the release, print its cost, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="cache folder (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="run each format in its engine")
    arguments = parser.parse_args()
    work = make_work(arguments.work.resolve())
    tokenizer = Tokenizer.load(work.tokenizer)
    with tempfile.TemporaryDirectory(prefix="release-1b-", dir=work.folder) as folder:
        problems = write(Path(folder), tokenizer) + judge(Path(folder))
        if arguments.verify:
            checks = verify_release(folder)
            print("\n".join(format_checks(checks)))
            problems += ["verify failed"] * (not all(check.passed for check in checks))
    if problems:
        raise SystemExit("\n".join(problems))


def write(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Write every format and print a line for each; return the formats that needed too much memory."""
    import ctranslate2.converters  # noqa: F401, PLC0415 - import the libraries before memory is measured
    import transformers  # noqa: F401, PLC0415

    before, peaks = memory("VmRSS"), []
    with stage("model, random", peaks):
        model = Llama(Recipe.load(NAME).model, tokenizer.vocab_size).eval()
        initialize(model, seed=0)
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    with stage("reference", peaks):
        facts = {
            "reference": compute_reference_outputs(model, tokenizer),
            "formats": ["huggingface", "gguf", "ctranslate2"],
        }
    with stage("huggingface", peaks):
        write_hugging_face(folder / "huggingface", model, tokenizer)
    del model
    for name in ("gguf", "ctranslate2"):
        with stage(name, peaks):
            write_formats(folder, [name], NAME)
    write_json(folder / "release.json", facts | {"files": hash_files(folder)})
    shard = max(path.stat().st_size for path in folder.glob("huggingface/*.safetensors"))
    grown, most = max(peaks) - before, sum(sizes) + shard + max(sizes)
    print(f"the libraries {before / 1e9:.2f} GB; growth of at most {grown / 1e9:.2f} GB;", end=" ")
    print(f"weights {sum(sizes) / 1e9:.2f}, a shard {shard / 1e9:.2f}, a matrix {max(sizes) / 1e9:.2f} GB")
    return [f"the process grew by {grown:,} bytes, more than {most:,}"] * (grown > most)


@contextmanager
def stage(name: str, peaks: list[int]) -> Iterator[None]:
    """Measure the time and the peak resident memory of the block, including pages of mapped files."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
    begun = time.perf_counter()
    yield
    peaks.append(memory("VmHWM"))
    print(f"{name:<15} {time.perf_counter() - begun:6.1f} s, peak {peaks[-1] / 1e9:.2f} GB", flush=True)


def memory(field: str) -> int:
    """Return a /proc status field of this process in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def judge(folder: Path) -> list[str]:
    """Print the size of every file; return the files with an unexpected size."""
    sizes = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size:>13,}  {path}")
    small = sizes[Path(f"gguf/{NAME}-Q4_K_M.gguf")]
    pages = sum(size for path, size in sizes.items() if path.parts[0] == "huggingface")
    problems = [f"Q4_K_M has {small:,} bytes, not under 700 MB"] * (small >= 700e6)
    return problems + [f"the bf16 folder has {pages:,} bytes, not 2.2 GB"] * (not 2.15e9 <= pages <= 2.25e9)


if __name__ == "__main__":
    main()
