"""`verify` passes what is right and names what is wrong, whoever made it wrong, and outlives its engines."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tests.engine_server import started_normally
from tests.release.formats import failed, only, random_model, write_release

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.model import weights
from tinyllama.release import formats, gguf
from tinyllama.release.huggingface import write_hugging_face
from tinyllama.release.verify import Check, _greedy, table, verify
from tinyllama.tokenizer import Tokenizer

pytest_plugins = ["tests.release.formats_fixtures"]

F16 = "gguf/small-F16.gguf"


@pytest.mark.slow
def test_an_untouched_release_passes_in_every_engine_and_stays_untouched(
    all_formats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in all_formats.rglob("*")}

    before = state()
    with started_normally():
        assert cli.main(["verify", str(all_formats)]) == 0
    assert state() == before
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"files +size and sha256 .* pass$", lines[1])
    for name in ("huggingface", "gguf F16", "ctranslate2 float32"):
        rows = [line for line in lines if line.startswith(f"{name} ")]
        assert [re.search(rf"{name} +(\w+)", row)[1] for row in rows] == ["bos", "tokens", "greedy", "nats"]  # type: ignore[index]
        assert " the same" in rows[2]  # of F16, up to a tie
    for name in ("gguf Q8_0", "gguf Q4_K_M", "ctranslate2 int8"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 3
    assert lines[-1] == "all 22 checks passed"


def make_gguf_again(release: Path) -> None:
    for path in (release / "gguf").iterdir():
        path.unlink()
    (release / "gguf").rmdir()
    gguf.write_gguf(release / "gguf", release / "huggingface", "small")


def plant_rope(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.release.gguf.permute_rope_rows", lambda weight, heads: weight)
    make_gguf_again(release)


def plant_no_start(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_add_bos_token
    monkeypatch.setattr("gguf.GGUFWriter.add_add_bos_token", lambda writer, _: add(writer, False))
    make_gguf_again(release)


def plant_swapped_in_gguf(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap, right = {"gate": "up", "up": "gate"}, gguf._names

    def swapped(*arguments: Any) -> dict[str, str]:
        return {re.sub(r"gate|up", lambda m: swap[m[0]], name): ours for name, ours in right(*arguments).items()}

    monkeypatch.setattr("tinyllama.release.gguf._names", swapped)
    make_gguf_again(release)


@pytest.mark.parametrize(
    ("plant", "rows"),
    [
        (plant_rope, {"gguf F16 greedy", "gguf F16 nats a token", "gguf Q8_0 nats a token"}),
        (plant_no_start, {"gguf F16 tokens", "gguf Q8_0 tokens", "gguf Q4_K_M tokens"}),
        (plant_swapped_in_gguf, {"gguf F16 greedy", "gguf F16 nats a token"}),
    ],
)
def test_a_wrong_gguf_fails(
    release: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None], rows: set[str]
) -> None:
    plant(release, monkeypatch)
    assert rows <= {f"{check.subject} {check.what}" for check in failed(only(release, "gguf"))}


@pytest.mark.slow
def test_gate_and_up_swapped_in_the_hugging_face_folder_fail_in_every_format(
    pieces: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {"ffn.gate_up": ("mlp.up_proj", "mlp.gate_proj")}
    monkeypatch.setattr(weights, "_BLOCK", weights._BLOCK | swapped)
    release = write_release(tmp_path / "release", random_model(pieces.vocab_size), pieces)
    found = {f"{check.subject} {check.what}" for check in failed(release)}
    for name in ("huggingface", "gguf F16", "ctranslate2 float32"):
        assert {f"{name} greedy", f"{name} nats a token"} <= found


@pytest.mark.slow
def test_a_truncated_shard_is_named_and_the_other_formats_are_still_checked(release: Path, pieces: Tokenizer) -> None:
    shutil.rmtree(release / "huggingface")
    write_hugging_face(release / "huggingface", random_model(pieces.vocab_size), pieces, shard_bytes=100_000)
    only(release, "huggingface", "ctranslate2/float32")
    shard = sorted(release.glob("huggingface/model-*.safetensors"))[2]
    cut(shard)
    first, second = failed(release)
    assert (first.subject, first.what) == (f"huggingface/{shard.name}", "size")
    assert (second.subject, second.what) == ("huggingface", "loads and runs")
    assert len(second.found) > 10


@pytest.mark.parametrize("name", [F16, "ctranslate2/int8/model.bin"])
def test_a_truncated_file_is_named_and_its_engine_says_why(release: Path, name: str) -> None:
    only(release, name.rpartition("/")[0])
    cut(release / name)
    first, second = failed(release)
    assert (first.subject, first.what) == (name, "size")
    assert second.what == "loads and runs"
    assert len(second.found) > 10
    assert "\n" not in second.found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_changed_and_missing_files_are_named(release: Path) -> None:
    only(release, "ctranslate2/int8")
    (release / "ctranslate2/int8/special_tokens_map.json").unlink()
    path = release / "ctranslate2/int8/model.bin"
    path.write_bytes(path.read_bytes()[:-9] + b"\1" + path.read_bytes()[-8:])
    rows = {check.subject: (check.what, check.found) for check in failed(release) if "/" in check.subject}
    assert rows["ctranslate2/int8/special_tokens_map.json"] == ("file", "missing")
    assert rows["ctranslate2/int8/model.bin"][0] == "sha256"


def test_a_format_that_is_gone_fails_and_raises_nothing(release: Path) -> None:
    only(release, "ctranslate2/int8")
    for path in (release / "ctranslate2/int8").iterdir():
        path.unlink()
    assert failed(release)[-1].what == "loads and runs"


@pytest.mark.slow
def test_a_format_without_files_and_a_release_without_any_are_no_pass(release: Path) -> None:
    facts = read_json(release / "release.json")
    facts["files"] = {name: entry for name, entry in facts["files"].items() if not name.startswith("gguf")}
    facts["formats"] = ["gguf"]
    write_json(release / "release.json", facts)
    assert any(check.subject == "gguf" and check.what == "format" for check in failed(release))
    write_json(release / "release.json", facts | {"files": {}})
    with pytest.raises(InputError, match="release the run again"):
        verify(release)


def test_a_start_marker_that_hugging_face_does_not_put_fails(release: Path) -> None:
    path = release / "ctranslate2/int8/tokenizer.json"
    write_json(path, read_json(path) | {"post_processor": None})
    (check,) = failed(only(release, "ctranslate2/int8"))
    assert (check.what, check.expected) == ("tokens", "[1]")


def test_another_end_of_text_fails(release: Path) -> None:
    path = release / "ctranslate2/int8/config.json"
    write_json(path, read_json(path) | {"eos_token": "<s>"})
    (check,) = failed(only(release, "ctranslate2/int8"))
    assert (check.what, check.expected, check.found) == ("bos, eos", "1, 2", "1, 1")


def test_a_fail_is_exit_status_1_and_stands_in_the_table(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only(release, "ctranslate2/int8")
    (release / "ctranslate2/int8/tokenizer_config.json").write_text("{}")
    assert cli.main(["verify", str(release)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"ctranslate2/int8/tokenizer_config.json +size +\d+ bytes +2 bytes +FAIL", lines[1])
    assert lines[-1] == "1 of 4 checks failed"


def test_what_is_no_release_or_has_no_reference_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no release here \(no release\.json\)"):
        verify(tmp_path)
    write_json(release / "release.json", {"files": {}})
    with pytest.raises(InputError, match=r"release\.json: no reference .*; release the run again"):
        verify(release)


@pytest.mark.parametrize(
    ("library", "names"),
    [("gguf", ["gguf"]), ("llama_cpp", ["gguf"]), ("ctranslate2", ["ctranslate2"]), ("transformers", ["ctranslate2"])],
)
def test_a_missing_library_is_named_with_its_extra(
    library: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.check_formats(["huggingface", *names])
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == library else object())
    with pytest.raises(InputError, match=rf'^{library} is not installed; pip install "tinyllama\[formats\]"$'):
        formats.check_formats(["huggingface", *names])
    formats.check_formats(["huggingface"])


def test_greedy_stops_at_a_tie_and_says_so_but_not_before() -> None:
    reference = {"continuations": [{"ids": [5, 6, 7], "margins": [1.0, 0.001, 1.0]}]}
    _, expected, found, passed = _greedy(reference, {"continuations": [[5, 9, 9]]}, 0.01)
    assert (expected, found, passed) == ("3 tokens", "1 the same; 1 stopped at a tie (margin under 0.01)", True)
    assert _greedy(reference, {"continuations": [[4, 6, 7]]}, 0.01)[1:] == ("5", "4, token 1 after prompt 1", False)
    assert _greedy(reference, {"continuations": [[5]]}, 0.0)[2:] == ("no more, token 2 after prompt 1", False)
    assert _greedy(reference, {"continuations": [[5, 6, 7]]}, 0.01)[2:] == ("3 the same", True)


def test_the_table_has_a_line_a_check_and_what_they_come_to() -> None:
    checks = [Check("gguf F16", "tokens", "3", "3", True), Check("a/much/longer/name", "size", "1", "2", False)]
    lines = list(table(checks))
    assert lines[1] == "gguf F16            tokens  3         3      pass"
    assert lines[2] == "a/much/longer/name  size    1         2      FAIL"
    assert lines[3] == "1 of 2 checks failed"
