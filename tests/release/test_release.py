"""Releases of a run's checkpoints: contents of release.json, atomicity, errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.conftest import flip_a_bit

import tinyllama
from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.recipe import Recipe
from tinyllama.release.release import release_run
from tinyllama.runs.run_dir import RunDir


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def release_folders(run: Path) -> list[str]:
    """Return the names of all folders next to the releases, hidden ones too."""
    return sorted(path.name for path in (run / "releases").iterdir() if path.is_dir())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "huggingface/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_release_has_the_newest_checkpoint_rounded_to_bf16(run: Path) -> None:
    folder = release_run(run)
    assert folder == run / "releases/step-00000040"
    ours, released = load_model(RunDir(run).checkpoint(40).path), load_model(folder)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), released.state_dict()[name]), name
    assert {weight.dtype for weight in weights_of(folder).values()} == {torch.bfloat16}
    assert (folder / "huggingface/model.safetensors").stat().st_mode & 0o044 == 0o044  # readable by other users


def test_step_or_checkpoint_folder_selects_the_checkpoint(run: Path) -> None:
    by_step = release_run(run, step=9)
    by_folder = release_run(RunDir(run).checkpoint(10).path)
    assert [folder.name for folder in (by_step, by_folder)] == ["step-00000009", "step-00000010"]
    assert read_json(by_step / "release.json")["step"] == 9
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights_of(by_step)[name], weights_of(by_folder)[name])


def test_existing_release_is_reused_only_on_request(released: Path) -> None:
    run = released.parents[1]
    for source in (run, released):
        result = tinyllama.release_run(source, reuse=True)
        assert (result.path, result.step, result.formats) == (released, 40, ("huggingface",))
    for reuse, formats in ((False, None), (True, ["huggingface"])):
        with pytest.raises(InputError, match="already released"):
            tinyllama.release_run(run, reuse=reuse, formats=formats)


def test_release_json_has_size_and_hash_of_every_file(released: Path) -> None:
    files = read_json(released / "release.json")["files"]
    assert set(files) == files_below(released) - {"release.json"}
    for name, entry in files.items():
        path = released / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"}
    assert needed <= {name.removeprefix("huggingface/") for name in files}


def test_release_json_has_the_lineage_from_raw_files_to_weights(raw: Path, released: Path) -> None:
    metadata, run = read_json(released / "release.json"), released.parent.parent
    recipe = Recipe.load(run / "recipe.yaml")
    manifest = read_json(raw / "store/manifest.json")
    assert (metadata["step"], metadata["tokens"]) == (40, 40 * recipe.train.batch_tokens)
    assert metadata["parameters"] == sum(weight.numel() for weight in weights_of(released).values())
    assert Recipe.model_validate(metadata["recipe"]["fields"]) == recipe
    assert metadata["recipe"]["digest"] == recipe.digest
    assert metadata["store"]["manifest_sha256"] == sha256_of(raw / "store/manifest.json")
    for name in ("prose", "notes"):
        assert metadata["store"]["sources"][name]["splits"] == manifest["sources"][name]["splits"]
        for split, entry in metadata["store"]["sources"][name]["splits"].items():
            assert entry["manifest_sha256"] == sha256_of(raw / "store" / name / split / "manifest.json")
    sizes = [path.stat().st_size for path in (raw / "slimpajama/part.jsonl", raw / "notes.jsonl")]
    assert metadata["store"]["inputs"] == {"files": 2, "bytes": sum(sizes)}
    assert metadata["tokenizer"]["digest"] == manifest["tokenizer"]["digest"]
    commit = RunDir(run).checkpoint(40).commit_path
    assert metadata["checkpoints"] == {"step-00000040": sha256_of(commit)}
    assert set(metadata["versions"]) == {"tinyllama", "torch", "python"}


def test_release_has_the_metrics_up_to_its_step(run: Path) -> None:
    measured = read_json(release_run(run, step=9) / "release.json")["measured"]
    assert measured == {"loss": 6.0 - 9 / 20, "training_seconds": 0.0}  # the rows have no speed
    measured = read_json(release_run(run, step=10) / "release.json")["measured"]
    assert measured["validation_step"] == 10
    assert measured["validation_bits_per_byte"] == 3.25


def test_releases_of_the_same_checkpoint_are_identical_and_events(run: Path) -> None:
    first = (release_run(run) / "release.json").read_bytes()
    assert (release_run(run, force=True) / "release.json").read_bytes() == first
    assert [event["step"] for event in RunDir(run).events() if event["event"] == "release"] == [40, 40]


def test_second_release_is_an_error_and_force_replaces_the_first(run: Path) -> None:
    folder = release_run(run)
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-00000040: already released"):
        release_run(run)
    assert (folder / "evaluation.json").exists()
    release_run(run, force=True)
    assert release_folders(run) == [folder.name]
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize("writer", ["release.save_file", "release.loss_plot", "card.render_card", "release.hash_files"])
def test_failed_release_leaves_nothing_behind(run: Path, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    folder = run / "releases/step-00000040"
    with monkeypatch.context() as patch:
        patch.setattr(f"tinyllama.release.{writer}", fail)
        with pytest.raises(OSError, match="No space left") as error:
            release_run(run)
        assert error.value.filename == str(folder)  # the command prints it
    assert release_folders(run) == []
    before = (release_run(run) / "release.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"tinyllama.release.{writer}", fail)
        with pytest.raises(OSError, match="No space left"):
            release_run(run, force=True)
    assert release_folders(run) == ["step-00000040"]
    assert (folder / "release.json").read_bytes() == before


def test_files_of_a_killed_release_do_not_get_into_the_next(run: Path) -> None:
    left_over = run / "releases/.step-00000040.part/huggingface"
    left_over.mkdir(parents=True)
    (left_over / "model-00001-of-00002.safetensors").write_bytes(b"half")
    folder = release_run(run)
    assert "huggingface/model-00001-of-00002.safetensors" not in files_below(folder)
    assert release_folders(run) == ["step-00000040"]


def damage_a_checkpoint(run: Path) -> None:
    flip_a_bit(next(RunDir(run).checkpoint(40).path.glob("*.distcp")))


def change_the_store(run: Path) -> None:
    (run / "store.json").write_text(json.dumps(read_json(run / "store.json") | {"validation_fraction": 0.9}))


@pytest.mark.parametrize(
    ("change", "step", "error"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), None, "neither a run nor a checkpoint"),
        (lambda run: None, 20, "no checkpoint of step 20; .*9, 10, 40"),
        (damage_a_checkpoint, None, r"step-00000040/.*distcp .*hash"),
        (change_the_store, None, r"store\.json: another store manifest .*sha256 \w{12}, not \w{12}\b"),
        (lambda run: (run / "metrics.jsonl").unlink(), None, r"metrics\.jsonl: no row"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 40}\n'), None, "a file there is invalid"),
        (lambda run: RunDir(run).checkpoint(9).commit_path.unlink(), 9, "no checkpoint of step 9; .*10, 40"),
    ],
)
def test_unusable_run_is_an_error_that_names_the_file(run: Path, change: Any, step: int | None, error: str) -> None:
    change(run)
    with pytest.raises(InputError, match=error) as raised:
        release_run(run, step=step)
    assert "\n" not in str(raised.value)
    assert not list(run.glob("releases/step-*"))


def test_release_has_the_recipe_that_trained_the_checkpoint(run: Path) -> None:
    before = Recipe.load(run / "recipe.yaml")
    changed = Recipe.load(run / "recipe.yaml", {"train.optimizer.learning_rate": 1.0})  # as after --allow-change
    (run / "recipe.yaml").write_text(changed.to_yaml())
    digest = read_json(release_run(run) / "release.json")["recipe"]["digest"]
    assert digest == before.digest != changed.digest


def test_checkpoint_outside_its_run_loads_but_is_not_released(run: Path, tmp_path: Path) -> None:
    checkpoint = RunDir(run).checkpoint(40).path
    inside = load_model(checkpoint).state_dict()
    copy = Path(shutil.copytree(checkpoint, tmp_path / "step-00000040"))
    shutil.rmtree(run)
    outside = load_model(copy).state_dict()
    assert [name for name in inside if not torch.equal(inside[name], outside[name])] == []
    assert load_tokenizer(copy).encode("def main():\n")
    with pytest.raises(InputError, match="not in a run"):
        release_run(copy)
