"""CTranslate2's folders, and the libraries that formats need."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.release.formats import SHAPE, failed_checks, keep_only, random_model, write_release
from tests.release.native import compute_type, logits_in_ctranslate2, run_in_child

from tinyllama.errors import InputError
from tinyllama.loading import load_model
from tinyllama.release import engines, formats
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

FOLDERS = ("float32", "int8")


def test_int8_takes_a_quarter_of_float32_and_computes_other_values_in_float32(all_formats: Path) -> None:
    sizes = [(all_formats / "ctranslate2" / kind / "model.bin").stat().st_size for kind in FOLDERS]
    assert 0.25 < sizes[1] / sizes[0] < 0.3
    types = [run_in_child(compute_type, all_formats / "ctranslate2" / kind) for kind in FOLDERS]
    assert types == ["float32", "int8_float32"]


@torch.no_grad()
def test_float32_logits_equal_ours(all_formats: Path) -> None:
    ids = list(range(100))
    found = run_in_child(logits_in_ctranslate2, all_formats / "ctranslate2/float32", ids)
    expected = load_model(all_formats / "huggingface")(torch.tensor([ids])).numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert expected.std() > 0.1


def test_conversion_prints_nothing_on_stderr(all_formats: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        engines.__file__,
        "convert",
        str(all_formats / "huggingface"),
        str(tmp_path / "new"),
    ]
    done = subprocess.run([*command, "int8_float32"], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "new/model.bin").is_file()


def test_tied_embeddings_and_spare_rows_pass_in_ctranslate2(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(tokenizer.vocab_size + 3, SHAPE.model_copy(update={"tie_embeddings": True, "kv_heads": 4}))
    release = write_release(tmp_path / "release", model, tokenizer, ["ctranslate2"])
    assert failed_checks(keep_only(release, "ctranslate2")) == []


@pytest.mark.parametrize(
    ("library", "names"),
    [("gguf", ["gguf"]), ("llama_cpp", ["gguf"]), ("ctranslate2", ["ctranslate2"]), ("transformers", ["ctranslate2"])],
)
def test_missing_library_is_an_error_with_its_extra(
    library: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.check_format_libraries(["huggingface", *names])
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == library else object())
    with pytest.raises(InputError, match=rf"^formats: {library} .*tinyllama\[formats\]"):
        formats.check_format_libraries(["huggingface", *names])
    formats.check_format_libraries(["huggingface"])


def test_release_without_the_library_of_its_charts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(InputError, match=r"^formats: matplotlib "):
        formats.check_format_libraries(["huggingface"])
