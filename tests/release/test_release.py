"""A release is whole, true to its checkpoint, and never half there under its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.conftest import flip_a_bit

from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.loading import load_model, load_tokenizer
from tinyllama.recipe import Recipe
from tinyllama.release import release, update_card
from tinyllama.runs.checkpoint import checkpoint_folder
from tinyllama.runs.run_dir import RunDir


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def folders_of(run: Path) -> list[str]:
    """What lies among the releases, hidden folders too."""
    return sorted(path.name for path in (run / "releases").iterdir() if path.is_dir())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "huggingface/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_a_release_holds_the_newest_checkpoint_rounded_to_bf16(run: Path) -> None:
    folder = release(run)
    assert folder == run / "releases/step-00000040"
    ours, released = load_model(checkpoint_folder(run, 40)), load_model(folder)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), released.state_dict()[name]), name
    assert {weight.dtype for weight in weights_of(folder).values()} == {torch.bfloat16}
    assert (folder / "huggingface/model.safetensors").stat().st_mode & 0o044 == 0o044  # a stranger may read it


def test_a_step_or_a_checkpoint_folder_says_which_one_to_release(run: Path) -> None:
    by_step = release(run, step=9)
    by_folder = release(checkpoint_folder(run, 10))
    assert [folder.name for folder in (by_step, by_folder)] == ["step-00000009", "step-00000010"]
    assert read_json(by_step / "release.json")["step"] == 9
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights_of(by_step)[name], weights_of(by_folder)[name])


def test_release_json_has_every_file_with_its_size_and_hash(released: Path) -> None:
    files = read_json(released / "release.json")["files"]
    assert set(files) == files_below(released) - {"release.json"}
    for name, entry in files.items():
        path = released / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    needed = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"}
    assert needed <= {name.removeprefix("huggingface/") for name in files}


def test_release_json_leads_from_the_raw_files_to_the_weights(raw: Path, released: Path) -> None:
    facts, run = read_json(released / "release.json"), released.parent.parent
    recipe = Recipe.load(run / "recipe.yaml")
    manifest = read_json(raw / "store/manifest.json")
    assert (facts["step"], facts["tokens"]) == (40, 40 * recipe.train.batch_tokens)
    assert facts["parameters"] == sum(weight.numel() for weight in weights_of(released).values())
    assert Recipe.model_validate(facts["recipe"]["fields"]) == recipe
    assert facts["recipe"]["digest"] == recipe.digest
    assert facts["store"]["manifest_sha256"] == sha256_of(raw / "store/manifest.json")
    for name in ("prose", "notes"):
        assert facts["store"]["sources"][name]["splits"] == manifest["sources"][name]["splits"]
        for split, entry in facts["store"]["sources"][name]["splits"].items():
            assert entry["manifest_sha256"] == sha256_of(raw / "store" / name / split / "manifest.json")
    sizes = [path.stat().st_size for path in (raw / "slimpajama/part.jsonl", raw / "notes.jsonl")]
    assert facts["store"]["inputs"] == {"files": 2, "bytes": sum(sizes)}
    assert facts["tokenizer"]["digest"] == manifest["tokenizer"]["digest"]
    assert facts["checkpoints"] == {"step-00000040": sha256_of(checkpoint_folder(run, 40) / "commit.json")}
    assert set(facts["versions"]) == {"tinyllama", "torch", "python"}


def test_a_checkpoint_is_released_with_what_was_measured_up_to_it(run: Path) -> None:
    assert read_json(release(run, step=9) / "release.json")["measured"] == {"loss": 6.0 - 9 / 20}
    measured = read_json(release(run, step=10) / "release.json")["measured"]
    assert measured["validation_step"] == 10
    assert measured["validation_bits_per_byte"] == 3.25


def test_the_same_checkpoint_gives_the_same_bytes_and_an_event(run: Path) -> None:
    first = (release(run) / "release.json").read_bytes()
    assert (release(run, force=True) / "release.json").read_bytes() == first
    events = list(RunDir(run).events())
    assert [(event["event"], event["step"]) for event in events] == [("release", 40)] * 2


def test_a_second_release_is_refused_and_force_replaces_it(run: Path) -> None:
    folder = release(run)
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-00000040: already released; --force"):
        release(run)
    assert (folder / "evaluation.json").exists()
    release(run, force=True)
    assert folders_of(run) == [folder.name]
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize("writer", ["hf.save_file", "loss_plot", "model_card", "hash_files"])
def test_a_release_that_breaks_off_leaves_nothing_behind(
    run: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"tinyllama.release.{writer}", full)
        with pytest.raises(OSError, match="No space left") as error:
            release(run)
        assert error.value.filename == str(run / "releases/step-00000040")  # what the command names
    assert folders_of(run) == []
    folder = release(run)
    before = (folder / "release.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(f"tinyllama.release.{writer}", full)
        with pytest.raises(OSError, match="No space left"):
            release(run, force=True)
    assert folders_of(run) == ["step-00000040"]
    assert (folder / "release.json").read_bytes() == before


def test_what_a_killed_release_left_does_not_get_into_the_next(run: Path) -> None:
    left_over = run / "releases/.step-00000040.part/huggingface"
    left_over.mkdir(parents=True)
    (left_over / "model-00001-of-00002.safetensors").write_bytes(b"half")
    folder = release(run)
    assert "huggingface/model-00001-of-00002.safetensors" not in files_below(folder)
    assert folders_of(run) == ["step-00000040"]


def damage_a_checkpoint(run: Path) -> None:
    flip_a_bit(next(checkpoint_folder(run, 40).glob("*.distcp")))


def change_the_store(run: Path) -> None:
    (run / "store.json").write_text(json.dumps(read_json(run / "store.json") | {"validation_fraction": 0.9}))


def uncommit(run: Path) -> None:
    (checkpoint_folder(run, 9) / "commit.json").unlink()


@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), None, "no run and no checkpoint here"),
        (lambda run: None, 20, r"no checkpoint of step 20; there are 9, 10, 40"),
        (damage_a_checkpoint, None, r"step-00000040/.*distcp does not match its hash"),
        (change_the_store, None, r"store\.json: digest .* but step-00000040 was trained with"),
        (lambda run: (run / "metrics.jsonl").unlink(), None, r"metrics\.jsonl: no row up to step 40"),
        (uncommit, 9, r"no checkpoint of step 9; there are 10, 40"),
    ],
)
def test_a_wrong_run_is_refused_by_name(run: Path, change: Any, step: int | None, message: str) -> None:
    change(run)
    with pytest.raises(InputError, match=message) as refused:
        release(run, step=step)
    assert "\n" not in str(refused.value)
    assert not list(run.glob("releases/step-*"))


def test_a_checkpoint_is_released_by_the_recipe_that_trained_it(run: Path) -> None:
    before = Recipe.load(run / "recipe.yaml")
    changed = Recipe.load(run / "recipe.yaml", {"train.optimizer.learning_rate": 1.0})  # as --allow-change leaves it
    (run / "recipe.yaml").write_text(changed.to_yaml())
    assert read_json(release(run) / "release.json")["recipe"]["digest"] == before.digest != changed.digest


def test_a_checkpoint_taken_out_of_its_run_is_a_model(run: Path, tmp_path: Path) -> None:
    inside = load_model(checkpoint_folder(run, 40)).state_dict()
    alone = Path(shutil.copytree(checkpoint_folder(run, 40), tmp_path / "alone"))
    shutil.rmtree(run)
    outside = load_model(alone).state_dict()
    assert [name for name in inside if not torch.equal(inside[name], outside[name])] == []
    assert load_tokenizer(alone).encode("def main():\n")


def test_a_card_is_only_updated_in_a_release(run: Path) -> None:
    with pytest.raises(InputError, match=r"no release here \(no release\.json\)"):
        update_card(run)
