"""benchmarks/quality.py stops a run in time, scores each held-out byte once, and compares models of equal size."""

import argparse
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tinyllama.data.store import TokenStore
from tinyllama.loading import load_model
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names in benchmarks/quality.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "quality.py"))


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 6, 9, 10])
def test_each_token_but_the_first_is_one_target(script, num_tokens):
    document = torch.arange(10, 10 + num_tokens)
    windows = script["windows_of"](document, 4)
    inputs, targets = windows[:, :-1].flatten().tolist(), windows[:, 1:].flatten().tolist()
    pairs = [(given, target) for given, target in zip(inputs, targets, strict=True) if target != script["PADDING"]]
    assert pairs == [(token - 1, token) for token in document.tolist()[1:]]


def test_score_counts_each_target_and_no_padding(script, monkeypatch):
    peers = runpy.run_path(str(BENCHMARKS / "quality_peers.py"))
    windows = torch.cat([script["windows_of"](torch.randint(7, (length,)), 4) for length in (3, 9, 90)])

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        assert ids.min() >= 0
        return torch.zeros(*ids.shape, 8)

    assert peers["nats_of"](logits_of, windows) == pytest.approx((2 + 8 + 89) * math.log(8), rel=1e-5)


@pytest.mark.parametrize("pause", [0.0, 7.0])
@pytest.mark.parametrize("seconds", [60.0, 100.5, 360.0])
def test_run_of_computed_steps_ends_in_time(script, seconds, pause):
    pace = script["Pace"](fixed=40.0, step=0.75, pause=pause, pause_steps=100)
    steps = script["steps_within"](pace, seconds)

    now, later = (
        pace.fixed + count * pace.step + math.ceil(count / pace.pause_steps) * pace.pause
        for count in (steps, steps + 1)
    )
    assert now <= seconds < later + pace.pause


def test_too_few_minutes_are_refused_with_the_fewest(script):
    pace = script["Pace"](fixed=50.0, step=4.0, pause=6.0, pause_steps=100)
    with pytest.raises(SystemExit, match=r"--minutes 0\.9: .* at least 1\.0"):
        script["steps_within"](pace, 54)


def test_pace_of_peer_excludes_the_first_steps(script, tmp_path):
    (tmp_path / "steps.txt").write_text("130\n150\n151\n152\n153\n")
    assert script["pace_of_peer"](tmp_path, 100.0, 160.0) == script["Pace"](fixed=55.0, step=1.0)


def test_table_compares_runs_of_one_round(script):
    trained = script["Trained"]
    found = {
        "tinyllama": [trained(1.5, 1000, 2_000_000, 6.0), trained(1.8, 1000, 2_000_000, 5.9)],
        "litgpt": [trained(2.0, 1010, 1_500_000, 6.1), trained(2.0, 1010, 1_500_000, 6.1)],
    }
    cells = [cell.strip() for cell in script["table"](found)[-1].split("|")]
    assert cells[1:3] == ["litgpt", "1,010"]
    assert cells[5:7] == ["2.0000 (2.0000-2.0000)", "17.5 (10.0-25.0) %"]
    script["check_sizes"](found)
    found["litgpt"] = [trained(2.0, 1031, 1_500_000, 6.1)]
    with pytest.raises(RuntimeError, match="litgpt: 1,031 parameters"):
        script["check_sizes"](found)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_peers_take_learning_rate_and_batch_size_from_the_recipe(script, optimizer):
    fields = {"train.optimizer.name": optimizer, "train.optimizer.learning_rate": 0.0123, "train.batch_sequences": 6}
    train = Recipe.load("demo", {**fields, "train.micro_batch_sequences": 6}).train
    jobs = {name: settings.fields(train, 50) for name, settings in script["SETTINGS"].items()}
    ours = [name for name in jobs if ", our" in name]
    assert {script["peer_of"](name) for name in ours} == {script["peer_of"](name) for name in jobs}
    assert {jobs[name]["batch_sequences"] for name in ours} == {6}
    for name in ours:
        assert "0.0123" in json.dumps(jobs[name]) or "learning rate" not in name
    assert all("0.0123" not in json.dumps(job) for name, job in jobs.items() if name not in ours)


@pytest.mark.slow
def test_own_run_has_the_score_of_its_model_on_the_held_out_text(script, small, tmp_path):
    arguments = argparse.Namespace(work=tmp_path, minutes=1.0, threads=1)
    comparison = script["Comparison"](small / "recipe.yaml", {}, arguments)
    folder = tmp_path / "run"
    folder.mkdir()
    earlier = {comparison.batch_sequences(name) for name in script["SETTINGS"] if ", our" in name}
    assert earlier == {32} != {comparison.batch_sequences("tinyllama")}
    seconds = comparison.train("tinyllama", 8, 7, folder)
    found = comparison.score("tinyllama", folder)

    recipe, pace = Recipe.load(folder / "runs/quality/recipe.yaml"), comparison.paces["tinyllama"]
    assert (recipe.train.steps, recipe.seed, pace.pause_steps) == (8, 7, recipe.train.validate_every_steps)
    assert 0 < pace.fixed + 8 * pace.step + pace.pause <= seconds + 1e-6
    model = load_model(folder / "runs/quality")
    assert found["num_parameters"] == model.num_parameters
    store, tokenizer = TokenStore.open(recipe.data.store), Tokenizer.load(recipe.tokenizer)
    documents = list(script["read_documents"](store))
    assert comparison.num_bytes == sum(len(tokenizer.decode(document.tolist()).encode()) for document in documents)
    nats = sum(
        model.loss(part[None, :-1], part[None, 1:]).item()
        for document in documents
        for start in range(0, len(document) - 1, 64)
        if len(part := document[start : start + 65]) > 1
    )
    assert found["nats"] == pytest.approx(nats, rel=1e-4)

    run = script["Trained"](1.5, model.num_parameters, 8 * 6 * 64, seconds / 60)
    measure = script["as_measure"]({"tinyllama": [run]}, comparison)
    assert (measure.section, measure.unit, measure.more_is_better) == ("quality", "bits/byte", False)
    assert "3,072 tokens" in measure.programs["tinyllama"].found
