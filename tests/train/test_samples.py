"""Samples: readable prompts from the validation text, and completions that leave the model and its code unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.reading import documents_of
from tests.train.single_process import build_state, load_recipe
from torch.fx import GraphModule

from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.model.generation import generate
from tinyllama.recipe import Recipe
from tinyllama.runs.samples import SAMPLE_TOKENS
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.samples import _beginning, complete_prompts, sample_prompts


@pytest.fixture
def recipe(small: Path) -> Recipe:
    return load_recipe(small, **{"train.sample_prompts": None})


def test_default_prompts_begin_validation_documents_of_different_sources(small: Path, recipe: Recipe) -> None:
    store, tokenizer = TokenStore.open(small / "store"), Tokenizer.load(small / "tokenizer")
    prompts = sample_prompts(recipe, store, tokenizer)
    texts = {
        name: [tokenizer.decode(document).strip() for document in documents_of(store[f"{name}/validation"])]
        for name in recipe.data.sources
    }
    sources = [{name for name in texts if any(text.startswith(prompt) for text in texts[name])} for prompt in prompts]
    assert len(prompts) == len(set(prompts)) == 3
    assert all(20 <= len(prompt) <= 60 and prompt == prompt.strip() for prompt in prompts)
    assert set.union(*sources) == {"modules", "lines"} and all(sources)


def test_default_prompts_from_tails_begin_with_a_complete_line_or_word(small: Path) -> None:
    recipe = load_recipe(small, **{"train.sample_prompts": None, "data.sources.lines.holdout": "tail"})
    tokenizer, store = Tokenizer.load(small / "tokenizer"), TokenStore.open(small / "store")
    lines = [tokenizer.decode(document) for document in documents_of(store["lines/validation"])]
    prompts = sample_prompts(recipe, store, tokenizer)
    found = [(text, text.index(prompt)) for prompt in prompts for text in lines if prompt in text]
    assert found
    assert all(text[start - 1] in "\n " for text, start in found if start)
    assert all(start for _, start in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A title of twenty and more\nand a text that follows the title.", "A title of twenty and more"),
        ("short\n" + "word " * 30, "short\n" + ("word " * 11).rstrip()),
        ("x" * 200, "x" * 60),
        ("\u8a9e" * 39 + "\ufffd" + "\u8a9e" * 100, None),
        ("text that stops at \x1b[31m a control character", None),
        ("only a few words", None),
        ("abc" + " " * 100 + "word " * 30, None),
        ("A title of twenty and more\r\nand a text that follows the title.", "A title of twenty and more"),
        ("\u8a9e" * 10 + "\u3000" + "\u8a9e" * 189, "\u8a9e" * 10 + "\u3000" + "\u8a9e" * 49),
    ],
    ids=["line", "words", "no space", "broken character", "control character", "short", "blanks", "CRLF", "wide space"],
)
def test_prompts_are_readable_and_end_with_a_line_or_word(text: str, expected: str | None) -> None:
    assert _beginning(text) == expected


@pytest.mark.parametrize("prompts", [[], ["b\n", "a", "b\n"], "a"], ids=["none", "several", "one"])
def test_prompts_of_the_recipe_replace_the_default(small: Path, prompts: Any) -> None:
    state = build_state(load_recipe(small, **{"train.sample_prompts": prompts}))
    assert state.sample_prompts == list(dict.fromkeys(prompts))


def test_prompt_that_fills_the_context_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"train\.sample_prompts: 'x x.* has \d+ tokens; "):
        build_state(load_recipe(small, **{"train.sample_prompts": ["x " * 200]}))


def test_prompts_do_not_change_the_digest(small: Path, recipe: Recipe) -> None:
    assert recipe.digest == load_recipe(small, **{"train.sample_prompts": ["a"]}).digest


def test_greedy_completion_equals_generation_and_ends_before_eos(recipe: Recipe) -> None:
    state = build_state(recipe)
    tokenizer = state.tokenizer
    ids = tokenizer.bos_prefix + tokenizer.encode("import os")
    tokens = list(generate(state.model, ids, SAMPLE_TOKENS))
    (sample,) = complete_prompts(state.model, tokenizer, ["import os"])
    assert tokenizer.decode([*ids, *tokens]) == "import os" + sample["greedy"]
    assert sample["sampled"] != sample["greedy"]
    tokenizer.eos_id = next(token for token in tokens if token != tokens[0])
    (shorter,) = complete_prompts(state.model, tokenizer, ["import os"])
    end = tokens.index(tokenizer.eos_id)
    assert tokenizer.decode([*ids, *tokens[:end]]) == "import os" + shorter["greedy"] != "import os" + sample["greedy"]


def test_samples_depend_only_on_the_weights_and_use_no_random_numbers_of_training(recipe: Recipe) -> None:
    state = build_state(recipe)
    before = torch.get_rng_state()
    first = complete_prompts(state.model, state.tokenizer, state.sample_prompts)
    assert torch.equal(torch.get_rng_state(), before)
    assert complete_prompts(state.model, state.tokenizer, state.sample_prompts[::-1]) == first[::-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_of_a_broken_model_do_not_end_the_run(recipe: Recipe, value: float) -> None:
    state = build_state(recipe)
    with torch.no_grad():
        state.model.head_weight.fill_(value)
    assert [sample["prompt"] for sample in complete_prompts(state.model, state.tokenizer, ["a"])] == ["a"]


def test_compiled_blocks_are_not_compiled_again(recipe: Recipe) -> None:
    torch._dynamo.reset()  # earlier tests of this process may have used up the limit of recompilations
    state, graphs = build_state(recipe), []

    def count(graph: GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    uncompiled = complete_prompts(state.model, state.tokenizer, ["import os"])
    for block in state.model.blocks:
        block.forward = torch.compile(block.forward, backend=count, dynamic=False)
    ids = torch.ones(2, 16, dtype=torch.long)
    state.model.loss(ids, ids)
    num_graphs = len(graphs)
    assert complete_prompts(state.model, state.tokenizer, ["import os"], is_compiled=True) == uncompiled
    state.model.loss(ids, ids)
    assert len(graphs) == num_graphs > 0
