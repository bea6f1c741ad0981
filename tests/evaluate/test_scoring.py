"""The log-likelihoods of lm-eval's own model on the same weights, whatever is computed together."""

import shutil
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tests.evaluate.conftest import hugging_face_model, loaded, our_model, requests_of

from tinyllama.evaluate.prefix_batching import Pair, form_batches, to_requests
from tinyllama.evaluate.scoring import Score, score_batch
from tinyllama.evaluate.tasks import load_tasks
from tinyllama.files import read_json, write_json
from tinyllama.loading import load_model
from tinyllama.model.llama import Llama


@pytest.fixture(scope="module")
def theirs(llama_folder: Path) -> LM:
    return hugging_face_model(llama_folder)


@torch.inference_mode()
def scored_alone(model: Llama, pair: Pair) -> Score:
    """A pair's score from the logits of its whole text."""
    before, after = pair
    ids = (before + after)[-(model.shape.context_length + 1) :]
    logits = model(torch.tensor([ids[:-1]]))[0, -len(after) :]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(after)[:, None])
    return float(chosen.double().sum()), logits.argmax(-1).tolist() == after


def same(ours: list[Score], others: list[Score]) -> None:
    """Equal to a millionth, and the same decisions."""
    assert [score[0] for score in ours] == pytest.approx([score[0] for score in others], rel=1e-6, abs=2e-5)
    assert [score[1] for score in ours] == [score[1] for score in others]


@pytest.mark.parametrize("batch_size", [1, 5, 500])
def test_shared_beginnings_give_what_each_request_alone_gives(llama_folder: Path, batch_size: int) -> None:
    model, random = load_model(llama_folder), torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(0, 600, (length,), generator=random).tolist()

    pairs: list[Pair] = []
    for _ in range(25):
        context = ids(1, 110)
        endings = [ids(1, 20) for _ in range(len(context) % 4 + 1)]
        pairs += [(context, ending) for ending in [*endings, endings[0][:1]]]
    groups = form_batches(to_requests(pairs, 96), batch_size)
    shared = sum(group.tokens for batch in groups for group in batch)
    assert (shared < 0.7 * sum(min(len(a + b), 97) - 1 for a, b in pairs)) == (batch_size > 1)
    scores: dict[int, Score] = {}
    for batch in groups:
        scores |= score_batch(model, batch)
    same([scores[number] for number in range(len(pairs))], [scored_alone(model, pair) for pair in pairs])


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "arc_easy", "boolq", "openbookqa"])
def test_log_likelihoods_equal_those_of_lm_evals_own_model(llama_folder: Path, theirs: LM, name: str) -> None:
    requests = requests_of(loaded(name), 20)
    same(our_model(llama_folder).loglikelihood(requests), theirs.loglikelihood(requests))


def test_with_examples_too(llama_folder: Path, theirs: LM) -> None:
    requests = requests_of(load_tasks(["openbookqa"], num_fewshot=1).tasks["openbookqa"], 10)
    same(our_model(llama_folder).loglikelihood(requests), theirs.loglikelihood(requests))


def test_what_is_longer_than_the_context_is_counted_and_scored_as_lm_eval_does(llama_folder: Path, theirs: LM) -> None:
    requests, model = requests_of(loaded("hellaswag"), 20), our_model(llama_folder)
    same(model.loglikelihood(requests), theirs.loglikelihood(requests))
    longer = [request for request in requests if len(model.tok_encode("".join(request.args))) > 97]
    assert 0 < len(longer) < len(requests), "both what fits into the context and what does not must be compared"
    assert model.shortened == {"hellaswag": len(longer)}


def test_scores_do_not_depend_on_the_batch_size(llama_folder: Path) -> None:
    requests = requests_of(loaded("hellaswag"), 10)
    alone = our_model(llama_folder, 1).loglikelihood(requests)
    for batch_size in (3, 40):
        same(our_model(llama_folder, batch_size).loglikelihood(requests), alone)


def test_a_tokenizer_that_puts_no_marker_in_front_is_followed(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "unmarked")
    write_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json") | {"post_processor": None})
    requests = requests_of(loaded("winogrande"), 3)
    same(our_model(folder).loglikelihood(requests), hugging_face_model(folder).loglikelihood(requests))


def test_an_empty_context_is_scored_as_lm_evals_own_model_does(llama_folder: Path, theirs: LM) -> None:
    requests = [Instance("loglikelihood", {}, ("", "The name of the module"), 0)]
    same(our_model(llama_folder).loglikelihood(requests), theirs.loglikelihood(requests))


def test_whole_texts_and_completions_equal_those_of_lm_evals_own_model(llama_folder: Path, theirs: LM) -> None:
    ours = our_model(llama_folder)
    texts = [Instance("loglikelihood_rolling", {}, ("The statement is a name. " * count,), 0) for count in (1, 60)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-6)
    options = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (prompt, options), 0) for prompt in ("The value of", "In a class")]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_a_continuation_without_tokens_is_certain(llama_folder: Path) -> None:
    requests = [Instance("loglikelihood", {}, ("The name", after), number) for number, after in enumerate(("", " is"))]
    empty, other = our_model(llama_folder).loglikelihood(requests)
    assert (empty[0], empty[1]) == (0.0, True)
    assert other[0] < 0
