"""Verification of releases: intact ones pass, and every planted error is found."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tests.cli.json_keys import read_documented_json
from tests.fork_server import started_normally
from tests.release.formats import failed_checks, keep_only, random_model, write_release

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json, write_json
from tinyllama.model import weights
from tinyllama.release import gguf
from tinyllama.release.card import update_card
from tinyllama.release.release import write_hugging_face
from tinyllama.release.verify import _verify_continuations, verify_release
from tinyllama.tokenizer import Tokenizer

F16 = "gguf/small-F16.gguf"


@pytest.mark.slow
def test_intact_release_passes_in_every_engine_and_is_not_changed(
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
        assert " the same" in rows[2]
    for name in ("gguf Q8_0", "gguf Q4_K_M", "ctranslate2 int8"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 3
    assert lines[-1] == "all 22 checks passed"


def write_gguf_again(release: Path) -> None:
    for path in (release / "gguf").iterdir():
        path.unlink()
    (release / "gguf").rmdir()
    gguf.write_gguf(release / "gguf", release / "huggingface", "small")


def plant_rope(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyllama.release.gguf.permute_rope_rows", lambda weight, heads: weight)
    write_gguf_again(release)


def plant_missing_bos(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = GGUFWriter.add_add_bos_token
    monkeypatch.setattr("gguf.GGUFWriter.add_add_bos_token", lambda writer, _: add(writer, False))
    write_gguf_again(release)


def plant_swapped_in_gguf(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap, names = {"gate": "up", "up": "gate"}, gguf.tensor_names

    def swapped(*arguments: Any) -> dict[str, str]:
        return {re.sub(r"gate|up", lambda m: swap[m[0]], name): ours for name, ours in names(*arguments).items()}

    monkeypatch.setattr("tinyllama.release.gguf.tensor_names", swapped)
    write_gguf_again(release)


@pytest.mark.parametrize(
    ("plant", "rows"),
    [
        (plant_rope, {"gguf F16 greedy", "gguf F16 nats per token", "gguf Q8_0 nats per token"}),
        (plant_missing_bos, {"gguf F16 tokens", "gguf Q8_0 tokens", "gguf Q4_K_M tokens"}),
        (plant_swapped_in_gguf, {"gguf F16 greedy", "gguf F16 nats per token"}),
    ],
)
def test_wrong_gguf_fails(
    release: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None], rows: set[str]
) -> None:
    plant(release, monkeypatch)
    assert rows <= {f"{check.subject} {check.what}" for check in failed_checks(keep_only(release, "gguf"))}


@pytest.mark.slow
def test_swapped_gate_and_up_projections_fail_in_every_format(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {"ffn.gate_up": ("mlp.up_proj", "mlp.gate_proj")}
    monkeypatch.setattr(weights, "_BLOCK", weights._BLOCK | swapped)
    release = write_release(tmp_path / "release", random_model(tokenizer.vocab_size), tokenizer)
    found = {f"{check.subject} {check.what}" for check in failed_checks(release)}
    for name in ("huggingface", "gguf F16", "ctranslate2 float32"):
        assert {f"{name} greedy", f"{name} nats per token"} <= found


@pytest.mark.slow
def test_truncated_shard_fails_and_other_formats_are_checked(release: Path, tokenizer: Tokenizer) -> None:
    shutil.rmtree(release / "huggingface")
    write_hugging_face(release / "huggingface", random_model(tokenizer.vocab_size), tokenizer, shard_bytes=100_000)
    keep_only(release, "huggingface", "ctranslate2/float32")
    shard = sorted(release.glob("huggingface/model-*.safetensors"))[2]
    truncate(shard)
    first, second = failed_checks(release)
    assert (first.subject, first.what) == (f"huggingface/{shard.name}", "size")
    assert (second.subject, second.what) == ("huggingface", "loads and runs")
    assert len(second.found) > 10


@pytest.mark.parametrize("name", [F16, "ctranslate2/int8/model.bin"])
def test_truncated_file_fails_with_the_engines_reason(release: Path, name: str) -> None:
    keep_only(release, name.rpartition("/")[0])
    truncate(release / name)
    first, second = failed_checks(release)
    assert (first.subject, first.what) == (name, "size")
    assert second.what == "loads and runs"
    assert len(second.found) > 10
    assert "\n" not in second.found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_changed_and_missing_files_fail(release: Path) -> None:
    keep_only(release, "ctranslate2/int8")
    (release / "ctranslate2/int8/special_tokens_map.json").unlink()
    path = release / "ctranslate2/int8/model.bin"
    path.write_bytes(path.read_bytes()[:-9] + b"\1" + path.read_bytes()[-8:])
    rows = {check.subject: (check.what, check.found) for check in failed_checks(release) if "/" in check.subject}
    assert rows["ctranslate2/int8/special_tokens_map.json"] == ("file", "missing")
    assert rows["ctranslate2/int8/model.bin"][0] == "sha256"


@pytest.mark.slow
def test_format_or_release_without_files_does_not_pass(release: Path) -> None:
    metadata = read_json(release / "release.json")
    metadata["files"] = {name: entry for name, entry in metadata["files"].items() if not name.startswith("gguf")}
    metadata["formats"] = ["gguf"]
    write_json(release / "release.json", metadata)
    assert any(check.subject == "gguf" and check.what == "format" for check in failed_checks(release))
    write_json(release / "release.json", metadata | {"files": {}})
    with pytest.raises(InputError, match="no reference"):
        verify_release(release)


def test_missing_bos_fails(release: Path) -> None:
    path = release / "ctranslate2/int8/tokenizer.json"
    write_json(path, read_json(path) | {"post_processor": None})
    (check,) = failed_checks(keep_only(release, "ctranslate2/int8"))
    assert (check.what, check.expected) == ("tokens", "[1]")


def test_wrong_eos_fails(release: Path) -> None:
    path = release / "ctranslate2/int8/config.json"
    write_json(path, read_json(path) | {"eos_token": "<s>"})
    (check,) = failed_checks(keep_only(release, "ctranslate2/int8"))
    assert (check.what, check.expected, check.found) == ("bos, eos", "1, 2", "1, 1")


def test_failed_check_is_exit_status_1_and_in_the_table(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_only(release, "ctranslate2/int8")
    (release / "ctranslate2/int8/tokenizer_config.json").write_text("{}")
    assert cli.main(["verify", str(release)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"ctranslate2/int8/tokenizer_config.json +size +\d+ bytes +2 bytes +FAIL", lines[1])
    assert lines[-1] == "1 of 4 checks failed"


def test_json_has_the_documented_keys_and_the_exit_status(release: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keep_only(release, "ctranslate2/int8")
    assert cli.main(["verify", str(release), "--json"]) == 0
    passed = read_documented_json("verify", capfd.readouterr().out)
    assert passed["passed"] and all(check["passed"] for check in passed["checks"])
    (release / "ctranslate2/int8/tokenizer_config.json").write_text("{}")
    assert cli.main(["verify", str(release), "--json"]) == 1
    failed = read_documented_json("verify", capfd.readouterr().out)
    assert not failed["passed"]
    assert sum(not check["passed"] for check in failed["checks"]) == 1


def test_folder_without_release_or_reference_is_an_error(release: Path, tmp_path: Path) -> None:
    for use in (verify_release, update_card):
        with pytest.raises(InputError, match=rf"^{tmp_path}: no release"):
            use(tmp_path)
    write_json(release / "release.json", {"files": {}})
    with pytest.raises(InputError, match=r"release\.json: no reference"):
        verify_release(release)


def test_continuations_are_compared_up_to_a_tie() -> None:
    reference = {"continuations": [{"ids": [5, 6, 7], "margins": [1.0, 0.001, 1.0]}]}

    def columns(ids: list[int], tie: float) -> tuple[str, str, bool]:
        check = _verify_continuations("x", reference, {"continuations": [ids]}, tie)
        return check.expected, check.found, check.passed

    assert columns([5, 9, 9], 0.01) == ("3 tokens", "1 the same; 1 stopped at a tie (margin under 0.01)", True)
    assert columns([4, 6, 7], 0.01) == ("5", "4, token 1 after prompt 1", False)
    assert columns([5], 0.0) == ("6", "no more, token 2 after prompt 1", False)
    assert columns([5, 6, 7], 0.01) == ("3 tokens", "3 the same", True)
