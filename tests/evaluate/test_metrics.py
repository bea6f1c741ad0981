"""Bits per byte of correct continuations, and the accuracy of a random choice."""

import math
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.task import Task
from tests.evaluate.conftest import loaded, our_model, scored

from tinyllama.evaluate.harness import bits_per_byte, chance


@pytest.mark.parametrize("name", ["arc_easy", "winogrande", "boolq"])
def test_bits_per_byte_equal_a_direct_computation(llama_folder: Path, name: str) -> None:
    task, model = loaded(name), our_model(llama_folder)
    bits, sizes = [], []
    for item in list(task.eval_docs)[:8]:
        context, continuation = correct_pair(task, item)
        ids, complete = (model.tok_encode(text) for text in (context, context + continuation))
        ((likelihood, _),) = model._score([(ids, complete[len(ids) :])])
        bits.append(-likelihood / math.log(2))
        sizes.append(len(continuation.encode()))
    row = scored(llama_folder, (name,), limit=8).rows[name]
    assert row["bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-6)
    leave_one_out = [(sum(bits) - a) / (sum(sizes) - b) for a, b in zip(bits, sizes, strict=True)]
    jackknife = math.sqrt(7 / 8 * np.square(np.array(leave_one_out) - np.mean(leave_one_out)).sum())
    assert row["bits_per_byte_stderr"] == pytest.approx(jackknife, rel=0.25)


def correct_pair(task: Task, item: dict[str, str]) -> tuple[str, str]:
    """Return the context and the correct continuation of an item, by the rules of each task."""
    match task.config.task:
        case "winogrande":
            before, after = item["sentence"].split("_")
            return before + item[f"option{item['answer']}"], f" {after.strip()}"
        case "boolq":
            return f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", (" no", " yes")[int(item["label"])]
        case _:
            choices = dict(zip(item["choices"]["label"], item["choices"]["text"], strict=True))  # type: ignore[index]
            return f"Question: {item['question']}\nAnswer:", f" {choices[item['answerKey']]}"


def test_chance_is_the_mean_over_items_with_different_numbers_of_choices() -> None:
    task = loaded("arc_easy")
    items = list(task.eval_docs)
    few = next(number for number, item in enumerate(items) if len(item["choices"]["text"]) != 4)
    task.build_all_requests(samples=[0, few])
    expected = (1 / 4 + 1 / len(items[few]["choices"]["text"])) / 2
    assert chance(task) == {"chance": pytest.approx(expected)}


def test_tasks_without_choices_have_neither_bits_per_byte_nor_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    task = loaded("arc_easy")
    monkeypatch.setattr(task, "OUTPUT_TYPE", "generate_until")
    assert bits_per_byte(task) == chance(task) == {}
