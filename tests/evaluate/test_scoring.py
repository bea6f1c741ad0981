"""Log-likelihoods equal those of lm-eval's own model for the same weights, whatever is batched together."""

import shutil
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tests.evaluate.conftest import hugging_face_model, loaded, our_model, requests_of

from tinyllama.evaluate.scoring import LogLikelihood, Pair, form_batches, score_batch, to_requests
from tinyllama.evaluate.tasks import load_tasks
from tinyllama.files import read_json, write_json
from tinyllama.loading import load_model
from tinyllama.model.llama import Llama


@pytest.fixture(scope="module")
def reference(llama_folder: Path) -> LM:
    return hugging_face_model(llama_folder)


@torch.inference_mode()
def score_unbatched(model: Llama, pair: Pair) -> LogLikelihood:
    """Return a pair's log-likelihood from the logits of its complete text."""
    context, continuation = pair
    ids = (context + continuation)[-(model.config.context_length + 1) :]
    logits = model(torch.tensor([ids[:-1]]))[0, -len(continuation) :]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])
    return float(chosen.double().sum()), logits.argmax(-1).tolist() == continuation


def assert_close(found: list[LogLikelihood], expected: list[LogLikelihood]) -> None:
    """Assert log-likelihoods equal to 1e-6 and identical greedy decisions."""
    assert [score[0] for score in found] == pytest.approx([score[0] for score in expected], rel=1e-6, abs=2e-5)
    assert [score[1] for score in found] == [score[1] for score in expected]


@pytest.mark.parametrize("batch_size", [1, 5, 500])
def test_shared_prefixes_do_not_change_scores(llama_folder: Path, batch_size: int) -> None:
    model, random = load_model(llama_folder), torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(0, 600, (length,), generator=random).tolist()

    pairs: list[Pair] = []
    for _ in range(25):
        context = ids(1, 110)
        endings = [ids(1, 20) for _ in range(len(context) % 4 + 1)]
        pairs += [(context, ending) for ending in [*endings, endings[0][:1]]]
    batches = form_batches(to_requests(pairs, 96), batch_size)
    num_tokens = sum(group.num_tokens for batch in batches for group in batch)
    assert (num_tokens < 0.7 * sum(min(len(a + b), 97) - 1 for a, b in pairs)) == (batch_size > 1)
    scores: dict[int, LogLikelihood] = {}
    for batch in batches:
        scores |= score_batch(model, batch)
    assert_close([scores[number] for number in range(len(pairs))], [score_unbatched(model, pair) for pair in pairs])


@pytest.mark.parametrize(
    ("name", "num_fewshot"),
    [("winogrande", None), ("arc_easy", None), ("boolq", None), ("openbookqa", None), ("openbookqa", 1)],
)
def test_log_likelihoods_equal_lm_evals(llama_folder: Path, reference: LM, name: str, num_fewshot: int | None) -> None:
    requests = requests_of(load_tasks([name], num_fewshot=num_fewshot).tasks[name], 20)
    assert_close(our_model(llama_folder).loglikelihood(requests), reference.loglikelihood(requests))


def test_log_likelihoods_of_a_scaled_rotary_embedding_equal_lm_evals(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "scaled")
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": "llama3", **scaling}
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"rope_scaling": rope, "rope_parameters": rope})
    requests = requests_of(loaded("hellaswag"), 5)
    expected = hugging_face_model(folder).loglikelihood(requests)
    assert_close(our_model(folder).loglikelihood(requests), expected)
    plain = our_model(llama_folder).loglikelihood(requests)
    assert [score for score, _ in plain] != pytest.approx([score for score, _ in expected], rel=1e-3)


def test_truncated_requests_are_counted_and_scored_as_in_lm_eval(llama_folder: Path, reference: LM) -> None:
    requests, model = requests_of(loaded("hellaswag"), 20), our_model(llama_folder)
    assert_close(model.loglikelihood(requests), reference.loglikelihood(requests))
    longer = [request for request in requests if len(model.tok_encode("".join(request.args))) > 97]
    assert 0 < len(longer) < len(requests), "the test needs requests that fit and requests that do not"
    assert model.truncated == {"hellaswag": len(longer)}


def test_a_tokenizer_that_adds_no_bos_is_followed(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "no-bos")
    write_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json") | {"post_processor": None})
    requests = requests_of(loaded("winogrande"), 3)
    assert_close(our_model(folder).loglikelihood(requests), hugging_face_model(folder).loglikelihood(requests))


def test_empty_context_is_scored_as_in_lm_eval(llama_folder: Path, reference: LM) -> None:
    requests = [Instance("loglikelihood", {}, ("", "The name of the module"), 0)]
    assert_close(our_model(llama_folder).loglikelihood(requests), reference.loglikelihood(requests))


def test_complete_texts_and_completions_equal_lm_evals(llama_folder: Path, reference: LM) -> None:
    ours = our_model(llama_folder)
    texts = [Instance("loglikelihood_rolling", {}, ("The statement is a name. " * count,), 0) for count in (1, 20)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(reference.loglikelihood_rolling(texts), rel=1e-6)
    options = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (prompt, options), 0) for prompt in ("The value of", "In a class")]
    assert ours.generate_until(prompts) == reference.generate_until(prompts)


def test_empty_continuation_has_log_likelihood_0(llama_folder: Path) -> None:
    requests = [Instance("loglikelihood", {}, ("The name", after), number) for number, after in enumerate(("", " is"))]
    empty, other = our_model(llama_folder).loglikelihood(requests)
    assert (empty[0], empty[1]) == (0.0, True)
    assert other[0] < 0
