"""Model cards: figures, snippets, metadata for the hub, updates with scores."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.release.conftest import MakeRun, evaluation

from tinyllama import cli
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.files import read_json, sha256_of
from tinyllama.loading import load_tokenizer
from tinyllama.model.flops import num_parameters
from tinyllama.recipe import Recipe
from tinyllama.release.card import render_card, update_card
from tinyllama.release.metadata import mean_of_seven
from tinyllama.release.release import release_run
from tinyllama.runs.run_dir import RunDir
from tinyllama.train.validation import read_validation_sequences

pytestmark = pytest.mark.slow

NO_RELEASES: dict[str, Any] = {"releases": [], "baselines": []}


def card_of(folder: Path) -> str:
    return (folder / "huggingface/README.md").read_text(encoding="utf-8")


def row_of(card: str, first: str) -> list[str]:
    """Return the cells of the only table row that starts with `first`."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def scored(released: Path, tmp_path: Path) -> Path:
    """A release with scores and an updated card."""
    folder = Path(shutil.copytree(released, tmp_path / "release"))
    evaluation().save(folder / "evaluation.json")
    assert update_card(folder) == folder / "huggingface/README.md"
    return folder


def test_rotary_embedding_and_architecture_are_those_of_the_recipe(released: Path, make_run: MakeRun) -> None:
    assert "architecture of\nLlama 2," in card_of(released)
    assert row_of(card_of(released), "rotary embedding")[1] == "base 10,000"
    scaling = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    card = card_of(release_run(make_run(head_dim=24, rope_scaling=scaling | {"original_context_length": 32})))
    assert "architecture of\nLlama 3.1, so software for Llama 3.1 loads it." in card
    assert row_of(card, "heads, key/value heads, width of a head")[1] == "4, 2, 24"
    assert row_of(card, "rotary embedding")[1] == "base 10,000, frequencies scaled: llama3 with factor 8"


def test_documents_have_the_special_tokens_of_the_tokenizer(released: Path) -> None:
    sentence = "A document is `<s>` text `</s>`; nothing is padded."
    assert sentence in card_of(released)
    metadata = read_json(released / "release.json")
    metadata["tokenizer"] |= {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
    assert "A document is `<|begin_of_text|>` text `<|end_of_text|>`;" in render_card(metadata, None, NO_RELEASES)
    for name in ("bos", "eos"):  # a release of an earlier version
        del metadata["tokenizer"][name]
    assert "A document is `BOS` text `EOS`;" in render_card(metadata, None, NO_RELEASES)


def test_hub_reads_the_metadata(released: Path) -> None:
    metadata = ModelCard.load(released / "huggingface/README.md").data
    expected = {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["tinyllama", "llama"],
        "datasets": ["cerebras/SlimPajama-627B"],
    }
    assert {name: metadata.get(name) for name in expected} == expected


def test_embedded_corpus_is_not_called_slimpajama(run: Path, raw: Path) -> None:
    marker = raw / "tinyllama-corpus.json"
    marker.write_text("{}")
    try:
        card = card_of(release_run(run))
    finally:
        marker.unlink()
    assert ModelCard(card).data.get("datasets") is None
    rows = [
        line for line in card.partition("## Scores")[0].splitlines() if line.startswith("| prose |")
    ]  # one per split
    assert rows
    assert all("| embedded corpus without RedPajamaGithub |" in row for row in rows)
    assert "trained on the embedded corpus of tinyllama" in card
    assert "huggingface.co/datasets" not in card


def test_deleted_sources_are_not_called_a_public_data_set(run: Path, raw: Path) -> None:
    (raw / "slimpajama").rename(raw / "elsewhere")
    try:
        card = card_of(release_run(run))
    finally:
        (raw / "elsewhere").rename(raw / "slimpajama")
    assert ModelCard(card).data.get("datasets") is None
    assert ModelCard(card).data.get("language") is None


@pytest.fixture(scope="module")
def in_all_formats(make_run: Any) -> Path:
    return release_run(make_run(), formats=["huggingface", "gguf", "ctranslate2"])


@pytest.fixture(scope="module")
def downloaded(in_all_formats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release as in a repository of the hub, where the Hugging Face files are in the root."""
    folder = Path(shutil.copytree(in_all_formats, tmp_path_factory.mktemp("hub") / "small"))
    shutil.copytree(folder / "huggingface", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "huggingface")
    return folder


@pytest.mark.parametrize("number", range(3), ids=["transformers", "llama.cpp", "ctranslate2"])
def test_every_snippet_runs_in_the_release_and_in_a_download(
    in_all_formats: Path, downloaded: Path, tmp_path: Path, number: int
) -> None:
    snippets = re.findall(r"```python\n(.*?)```", card_of(in_all_formats), re.DOTALL)
    assert len(snippets) == 3
    (tmp_path / "snippet.py").write_text(snippets[number])
    program = Path(__file__).with_name("in_folders_program.py")
    command = [sys.executable, str(program), str(tmp_path / "snippet.py"), str(in_all_formats), str(downloaded)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = re.fullmatch(r"(The file is opened.+)(The file is opened.+)", done.stdout, re.DOTALL).groups()  # type: ignore[union-attr]
    assert first == second


def test_training_table_has_the_recipe(released: Path) -> None:
    card, recipe = card_of(released), Recipe.load(released.parent.parent / "recipe.yaml")
    parameters = num_parameters(recipe.model, load_tokenizer(released).vocab_size)
    assert row_of(card, "parameters")[1] == f"{parameters:,}"
    assert row_of(card, "tokens seen")[1] == "15,360 of 15,360 planned"
    assert row_of(card, "steps")[1] == "40 of 40"
    assert row_of(card, "batch")[1] == "384 tokens (6 sequences)"
    assert row_of(card, "sequence length")[1] == "64 tokens"
    assert row_of(card, "learning rate")[1] == "0.003 at its peak, 5 steps of warm-up, then a cosine decay to 0.0003"
    assert row_of(card, "precision")[1] == "float32"
    assert row_of(card, "seed")[1] == "1337"
    assert row_of(card, "recipe digest")[1] == f"`{recipe.digest}`"
    assert row_of(card, "hardware")[1] == (
        "Xeon 6, 8 cores, 4 threads; fp32 peak 0.25 TFLOP/s per rank, measured; then 2 x NVIDIA L4; fp32 peak not known"
    )
    assert "Validation at step 40: **2.1250 bits per byte**" in card
    validated = read_validation_sequences(recipe, TokenStore.open(recipe.data.store))
    prose, notes = (f"{64 * len(sequences):,}" for sequences in validated.values())
    assert f"\n| prose | {prose} | 4.0000 | 2.0000 |\n| notes | {notes} | 5.0000 | 2.5000 |\n" in card
    assert "\n| 0-255 | 4.5000 | 2.2500 |\n| 256-511 | 4.0000 | 2.0000 |\n" in card


def test_training_time_is_that_of_the_steps_up_to_the_release(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"tokens_per_second": 384 / 90}) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text)
    card = card_of(release_run(run, step=10))
    # the row of an earlier version
    assert "| validation tokens |" not in card
    assert "| positions in the sequence |" not in card
    assert row_of(card, "training time")[1] == "15 min, without validation, checkpoints and interruptions"


def test_card_without_a_license_has_the_steps_to_add_one(run: Path) -> None:
    assert "The license of this model is `apache-2.0`." in card_of(release_run(run))
    fields = yaml.safe_load((run / "recipe.yaml").read_text())
    fields["release"]["license"] = None
    (run / "recipe.yaml").write_text(yaml.safe_dump(fields))  # the checkpoint's recipe still has a license
    card = card_of(release_run(run, force=True))
    assert "no license yet" in card and "`tinyllama release --force`" in card
    assert ModelCard(card).data.get("license") is None


def test_samples_are_those_of_the_release_and_stay_in_their_block(released: Path) -> None:
    section = card_of(released).partition("## Samples")[2].partition("\n## ")[0]
    assert "2 prompts at step 40: " in section and "temperature 0.7" in section
    blocks = re.findall(r"^```text\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    completions = ['most probable: "```\\n# 40"', r'sampled:       "\u001b[31m"']
    assert [block.splitlines() for block in blocks] == [[f'prompt:        "{name}"', *completions] for name in "ab"]


def test_data_table_has_the_stores_manifest(released: Path, raw: Path) -> None:
    card, manifest = card_of(released), read_json(raw / "store/manifest.json")
    data = card.partition("## Scores")[0].splitlines()
    rows = [line.split(" | ") for line in data if line.startswith(("| prose |", "| notes |"))]
    found = {(cells[0].strip("| "), cells[3]): cells[2:] for cells in rows}
    for name, share in (("prose", "75.0%"), ("notes", "25.0%")):
        for split, entry in manifest["sources"][name]["splits"].items():
            counts = [f"{entry['documents']:,}", f"{entry['tokens']:,}"]
            sha256 = f"`{entry['manifest_sha256'][:16]}` |"
            assert found[name, split] == [share, split, *counts, sha256]


def test_card_without_scores_has_a_command_that_works_in_a_download(
    downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = re.search(r"Not scored yet. Run `tinyllama (.+?)`", (downloaded / "README.md").read_text("utf-8"))
    assert command is not None
    folder = Path(shutil.copytree(downloaded, tmp_path / "hub/small"))
    monkeypatch.chdir(folder)
    assert cli.main([*command[1].split(), "--limit", "2"]) == 0
    assert read_json(folder / "evaluation.json")["model"] == "small"
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_scores_have_errors_items_and_published_baselines(scored: Path) -> None:
    card = card_of(scored)
    own = [cell.strip("*") for cell in row_of(card, "**small, step 40**")]
    assert own == ["small, step 40", "2026-09-21", "15.4K", "30.50 ± 3.26", "", "measured, first 200 of 10042 items"]
    assert row_of(card, "hellaswag")[1:5] == ["26.50 ± 3.13", "30.50 ± 3.26", "", "first 200 of 10042 items"]
    published = [line for line in card.splitlines() if "| published, " in line]
    assert any(line.startswith("| Pythia-1B |  | 300B | 47.16 | 48.3") for line in published)
    assert any(line.startswith("| StableLM-Alpha-3B |  | 800B | 38.31 |") for line in published)
    assert "Not scored yet" not in card


def test_mean_of_seven_needs_all_seven_and_prefers_acc_norm() -> None:
    scores = {"hellaswag": 59.20, "openbookqa": 36.00, "arc_challenge": 30.12, "arc_easy": 55.25, "piqa": 73.29}
    rows = {task: {"acc": 0.1, "acc_norm": score / 100} for task, score in scores.items()}
    rows |= {"winogrande": {"acc": 0.5912}, "boolq": {"acc": 0.5783}}
    assert mean_of_seven(rows) == pytest.approx(52.97, abs=0.005)  # from the published scores of the 3T checkpoint
    del rows["boolq"]
    assert mean_of_seven(rows) is None


def test_every_card_of_a_run_has_all_releases_and_measured_baselines(run: Path) -> None:
    first, last = release_run(run, step=10), release_run(run, step=40)
    for folder, step in ((first, 10), (last, 40)):
        evaluation(step=step).save(folder / "evaluation.json")
        update_card(folder)
    evaluation(model="EleutherAI/pythia-70m", step=None, tokens=None).save(RunDir(run).releases.baseline_path("a/b"))
    update_card(last)
    for folder, own, other in ((first, 10, 40), (last, 40, 10)):
        card = card_of(folder)
        assert row_of(card, f"**small, step {own}**")[3] == row_of(card, f"small, step {other}")[3].join(["**"] * 2)
        assert row_of(card, "EleutherAI/pythia-70m")[5] == "measured, first 200 of 10042 items"
        assert "(scores.png)" in card
        assert (folder / "huggingface/scores.png").stat().st_size > 10_000
    table = read_json(run / "releases/releases.json")
    assert [(row["step"], row["folder"]) for row in table["releases"]] == [(10, first.name), (40, last.name)]


def test_few_shot_scores_are_marked_and_not_compared(released: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "release"))
    evaluation(num_fewshot={"hellaswag": 10}).save(folder / "evaluation.json")
    card = update_card(folder).read_text()
    assert row_of(card, "hellaswag")[4] == "first 200 of 10042 items, 10 examples before each"
    assert "Pythia-1B" not in card
    (row,) = read_json(tmp_path / "releases.json")["releases"]
    assert row["hellaswag"] is None and not row["complete"]


def test_hub_reads_the_scores(scored: Path) -> None:
    results = {
        result.metric_type: result for result in ModelCard.load(scored / "huggingface/README.md").data.eval_results
    }
    assert (results["acc_norm"].metric_value, results["acc_norm"].dataset_type) == (30.5, "Rowan/hellaswag")
    assert results["acc"].metric_args == {"stderr": 3.13, "num_fewshot": 0}
    assert results["acc"].dataset_name == "hellaswag (first 200 of 10042 items)"


def test_update_hashes_only_what_it_writes(scored: Path) -> None:
    files = read_json(scored / "release.json")["files"]
    assert {"evaluation.json", "huggingface/README.md"} <= set(files)
    for name, entry in files.items():
        assert entry == {"bytes": (scored / name).stat().st_size, "sha256": sha256_of(scored / name)}
    (scored / "huggingface/model.safetensors").write_bytes(b"damaged")
    update_card(scored)
    assert read_json(scored / "release.json")["files"] == files


def test_scores_of_another_step_are_an_error(released: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(released, tmp_path / "release"))
    before = card_of(folder)
    evaluation(step=10).save(folder / "evaluation.json")
    with pytest.raises(InputError, match=r"step 10, .*step 40"):
        update_card(folder)
    assert card_of(folder) == before


def test_card_of_an_older_release_in_fp16_lacks_only_what_was_not_recorded(released: Path) -> None:
    metadata = read_json(released / "release.json")
    for record, name in ((metadata, "license"), (metadata, "samples"), (metadata["measured"], "training_seconds")):
        del record[name]
    metadata["measured"]["loss"] = None  # every step was skipped
    metadata["recipe"]["fields"]["train"]["precision"] = "fp16"
    card = render_card(metadata, None, NO_RELEASES)
    assert "no license yet" in card and "training time" not in card and "Training loss" not in card
    assert row_of(card, "precision")[1] == "fp16 computation, float32 weights"


def test_card_has_the_mixture_stages(released: Path) -> None:
    metadata = read_json(released / "release.json")
    metadata["recipe"]["fields"]["data"]["stages"] = [{"from_tokens": 5000, "weights": {"notes": 3, "prose": 1}}]
    assert "From 5,000 tokens on: notes 75.0%, prose 25.0%" in render_card(metadata, None, NO_RELEASES)
    metadata["recipe"]["fields"]["data"]["stages"][0]["ramp_tokens"] = 6000
    assert "From 5,000 tokens on, reached over 6,000 tokens: notes 75.0%" in render_card(metadata, None, NO_RELEASES)
