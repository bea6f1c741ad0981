"""Verification of a release: each format runs in its engine, and the outputs are compared with a reference.

The reference is computed from the checkpoint before the export and stored in release.json. A comparison with the
Hugging Face folder would miss errors in that folder, such as swapped gate and up projections. Engines run in child
processes, so an engine that crashes on a damaged file causes only a failed check.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tinyllama.errors import InputError
from tinyllama.files import sha256_of
from tinyllama.formatting import format_table
from tinyllama.loading import HuggingFaceLlama, check_model_folder
from tinyllama.model.flops import num_parameters
from tinyllama.model.llama import Llama
from tinyllama.progress import Bar
from tinyllama.recipe import Model
from tinyllama.release.engines import EngineOutput, crash_line, run_engine
from tinyllama.release.formats import LIBRARIES, ReleasedFormat, list_formats, require_libraries
from tinyllama.runs.run_dir import ReleaseDir
from tinyllama.tokenizer import Tokenizer

Reference = dict[str, Any]

NEW_TOKENS = 32
PROMPTS = ("The old library stands", "def read(path):\n    ", "1. In the year 1859")
NUM_VOCABULARY_TOKENS = 300
TOKENS_BEYOND_ORIGINAL_CONTEXT = 128
"""Number of scored tokens beyond the original context of a model with scaled rotary frequencies."""
# A model of 1.1B parameters with Llama 2's vocabulary can be scored on 2,700 tokens, one with Llama 3's on 2,092.
MAX_SCORED_COMPUTE, MAX_SCORED_LOGITS = 3 * 10**12, 1 << 28
"""Limits of tokens times parameters, and of tokens times vocabulary size; TEXT itself is always scored."""
# Texts that converters or tokenizers are known to get wrong: repeated spaces, control characters, special tokens, and
# other writing systems.
# fmt: off
TOKENIZER_TEST_TEXTS = (
    "", " ", "   ", "Hello world  foo", "   two ends   ", "\t\tif x:\r\n        return {'a': [1, 2]}\n\n\n",
    " \n \n  \n", "日本語 中文。한국어", "\U0001f999 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "e\u0301 n\u0303o a\u030a\u0323", "\x01\x7f\x85\ue000\U0010ffff\ufeff\ufffd", "a\0b", "<s>", "▁ ▁▁x",
    "<s>x</s> <unk><0x0A> [INST]", "<|endoftext|><|im_start|>", "x = 1234567890.5e-3", "naïve.foo(é)ñ_1 İıßﬁ",
    "a" * 40 + " " * 70 + "-" * 40, "I'll don't WE'RE it's", "Ünïcödé ελληνικά русский עברית العربية हिन्दी ไทย",
)
# fmt: on
# The beginning of C. Darwin, On the Origin of Species (1859), and ordinary code.
TEXT = '''\
When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the distribution of the \
inhabitants of South America, and in the geological relations of the present to the past inhabitants of that \
continent. These facts seemed to me to throw some light on the origin of species--that mystery of mysteries, as it has \
been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that something might \
perhaps be made out on this question by patiently accumulating and reflecting on all sorts of facts which could \
possibly have any bearing on it.

def find(rows: list[int], wanted: int) -> int | None:
    """Place of a value among sorted ones; None where it is not there."""
    first, last = 0, len(rows) - 1
    while first <= last:
        middle = (first + last) // 2
        if rows[middle] == wanted:
            return middle
        if rows[middle] < wanted:
            first = middle + 1
        else:
            last = middle - 1
    return None
'''


@torch.inference_mode()
def compute_reference_outputs(model: Llama, tokenizer: Tokenizer) -> Reference:
    """Compute the reference for `verify`: the outputs of a float32 model on the CPU.

    The outputs are the token ids of difficult texts, greedy continuations of PROMPTS, and the nats per token of TEXT.
    With scaled rotary frequencies, a longer text is scored. All but its last NEW_TOKENS tokens are a further prompt.
    The model's weights are first rounded to bf16 in place, because exported weights are in bf16. The margin of a token
    in a continuation is its logit minus the second largest logit. EOS is never chosen, so a continuation has fewer than
    NEW_TOKENS tokens only if it reaches the context length.
    """
    assert model.precision == torch.float32, "the reference is computed in float32"
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    texts = [*TOKENIZER_TEST_TEXTS, _text_of_tokens(tokenizer)]
    context_length, original = model.config.context_length, _original_context(model.config)
    scored = _scored_ids(tokenizer, model, original)
    prompts = [(tokenizer.bos_prefix + tokenizer.encode(text))[: max(1, context_length // 2)] for text in PROMPTS]
    if original:
        prompts.append(scored[: max(1, len(scored) - NEW_TOKENS)])
    return {
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "texts": [{"text": text, "ids": tokenizer.bos_prefix + tokenizer.encode(text)} for text in texts],
        "continuations": [_continue(model, prompt, tokenizer.eos_id) for prompt in prompts],
        "scored": {"ids": scored, "nats_per_token": _score(model, scored), "original_context": original},
    }


def _score(model: Llama, ids: list[int]) -> float:
    logits = model(torch.tensor([ids]))[0, :-1]
    return float(F.cross_entropy(logits, torch.tensor(ids[1:])))


def _original_context(config: Model) -> int | None:
    """Return the context length before the rotary frequencies were scaled, or None if they are not scaled."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    return scaling.original_context_length or int(config.context_length / scaling.factor)


def _scored_ids(tokenizer: Tokenizer, model: Llama, original: int | None) -> list[int]:
    """Return the ids of TEXT, followed by its words in random order if the text reaches beyond the original context.

    Random order keeps the text from repeating, because repeated text is easy to predict.
    """
    ids = tokenizer.bos_prefix + tokenizer.encode(TEXT)
    if original:
        parameters = num_parameters(model.config, model.vocab_size)
        affordable = min(MAX_SCORED_COMPUTE // parameters, MAX_SCORED_LOGITS // model.vocab_size)
        count = max(len(ids), min(original + TOKENS_BEYOND_ORIGINAL_CONTEXT, affordable))
        words, order = TEXT.split(), random.Random(0)
        while len(ids) < count:
            ids += tokenizer.encode(" ".join(order.sample(words, len(words))))
        ids = ids[:count]
    return ids[: model.config.context_length]


def _text_of_tokens(tokenizer: Tokenizer) -> str:
    """Return a text of several hundred tokens in random order, whose encoding reveals wrong scores and merges."""
    texts = sorted({token.decode(errors="ignore") for token in tokenizer.token_bytes()} - {""})
    chosen = texts[:: max(1, len(texts) // NUM_VOCABULARY_TOKENS)]
    random.Random(0).shuffle(chosen)
    return "".join(chosen)


def _continue(model: Llama, prompt: list[int], eos_id: int | None) -> dict[str, Any]:
    """Return a greedy continuation of a prompt, with the margin of each token in logits."""
    count = min(NEW_TOKENS, model.config.context_length - len(prompt))
    caches = model.new_caches(1, len(prompt) + count)
    read, ids, margins = torch.tensor([prompt]), [], []
    for _ in range(count):
        logits = model(read, caches)[0, -1]
        if eos_id is not None:
            logits[eos_id] = -torch.inf
        best, tokens = logits.topk(2)
        ids.append(int(tokens[0]))
        margins.append(float(best[0] - best[1]))
        read = tokens[:1][None]
    return {"prompt_ids": prompt, "ids": ids, "margins": margins}


@dataclass(frozen=True)
class Check:
    """One row of the table of checks."""

    subject: str
    """Format or file."""
    what: str
    expected: str
    found: str
    passed: bool
    remedy: str = ""
    """Remedy if a signal ended the engine; such a failure does not show that the file is invalid."""


@dataclass(frozen=True)
class Tolerance:
    """Maximum differences between a format's outputs and the reference."""

    nats: float
    """Relative difference of the mean nats per token."""
    tie: float | None
    """Margin in logits below which a token of the reference counts as tied. If a format computes another token
    at a tie, the comparison of this continuation ends without failure. If None, no tokens are compared, because
    rounding to 4 or 8 bits can make another token the most likely one."""


# The differences below were measured on SmolLM2-135M, which is unusually sensitive because its 135M weights were
# trained on 2T tokens. The nats per token differ from the reference by 0.0001 % in float32, 0.005 % in F16 (float16
# matrix products; up to 0.008 % for random weights), 0.4 % in Q8_0, 2.4 % in Q4_K_M and 0.3 % in int8. Larger models
# differ less. In F16, the logits of randomly initialized models differ by 0.007 if the standard deviation of the logits
# is 1, and by 0.06 if it is 2.7. The margin of a tie can be smaller than 0.06, because it compares two logits at one
# position.
TOLERANCES = {
    "huggingface": Tolerance(nats=1e-4, tie=1e-3),
    "gguf F16": Tolerance(nats=1e-3, tie=0.02),
    "gguf Q8_0": Tolerance(nats=0.01, tie=None),
    "gguf Q4_K_M": Tolerance(nats=0.05, tie=None),
    "ctranslate2 float32": Tolerance(nats=1e-4, tie=1e-3),
    "ctranslate2 int8": Tolerance(nats=0.01, tie=None),
}


def verify_release(folder: str | Path) -> list[Check]:
    """Check a release's files, and each of its formats in transformers, llama.cpp or CTranslate2.

    Raises InputError if the folder is not a release, if release.json has no reference, or if an engine is not
    installed.
    """
    release = ReleaseDir(Path(folder))
    metadata = release.metadata()
    if not (metadata.keys() >= {"reference", "files", "formats"} and metadata["reference"] and metadata["files"]):
        raise InputError(f"{release.metadata_path}: no reference to compare the formats with; release the run again")
    formats = list_formats(metadata["files"])
    require_libraries(library for released in formats for library in LIBRARIES[released.kind])
    kinds = {released.kind for released in formats}
    missing = [kind for kind in metadata["formats"] if kind not in kinds]
    source = _unchanged_source(metadata)
    with Bar("verifying", 1 + len(formats) + bool(source), "parts", rate="") as bar:
        bar.show(0, "every file's hash")
        checks = verify_files(release.path, metadata["files"])
        checks += [Check(kind, "format", "its files", "none in release.json", False) for kind in missing]
        for done, released in enumerate(formats, 1):
            bar.show(done, f"{released.name} in {released.engine}")
            checks += verify_format(released, release.path / released.path, metadata["reference"])
        if source:
            bar.show(1 + len(formats), f"{source} in transformers")
            checks += verify_source(source, metadata["reference"])
        bar.show(1 + len(formats) + bool(source))
    return checks


def verify_files(folder: Path, files: dict[str, Any]) -> list[Check]:
    """Compare the files with their sizes and hashes in release.json.

    Return a failed check for each missing or changed file, or one passed check if all files are unchanged.
    """
    failed = [check for name, entry in files.items() if (check := _verify_file(folder, name, entry))]
    total = f"{len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes"
    return failed or [Check("files", "size and sha256", total, total, True)]


def _verify_file(folder: Path, name: str, entry: dict[str, Any]) -> Check | None:
    path = folder / name
    if not path.is_file():
        return Check(name, "file", f"{entry['bytes']:,} bytes", "missing", False)
    if (size := path.stat().st_size) != entry["bytes"]:
        return Check(name, "size", f"{entry['bytes']:,} bytes", f"{size:,} bytes", False)
    if (digest := sha256_of(path)) != entry["sha256"]:
        return Check(name, "sha256", entry["sha256"][:12], digest[:12], False)
    return None


def verify_format(released: ReleasedFormat, path: Path, reference: Reference) -> list[Check]:
    """Run one format in its engine and check the outputs."""
    tolerance = TOLERANCES[released.name]
    if tolerance.tie is None:
        reference = {**reference, "continuations": []}
    output = _run_engine(released.engine, path, reference)
    if "error" in output:
        return [Check(released.name, "loads and runs", "yes", output["error"], False, output.get("remedy", ""))]
    checks = [_verify_special_tokens(released.name, reference, output)]
    checks.append(_verify_tokens(released.name, reference, output))
    if tolerance.tie is not None:
        checks.append(_verify_continuations(released.name, reference, output, tolerance.tie))
    return [*checks, _verify_loss(released.name, reference, output, tolerance.nats)]


def _run_engine(engine: str, path: Path, reference: Reference) -> EngineOutput:
    """Call `run_engine`, or return an error if the format's folder refers to files outside the folder."""
    try:
        if path.is_dir():
            check_model_folder(path)
    except InputError as error:
        return {"error": str(error)}
    return run_engine(engine, path, reference)


def verify_source(folder: Path, reference: Reference) -> list[Check]:
    """Check that transformers and this project compute the same outputs from external weights.

    Comparing the formats cannot reveal that this project read the weights incorrectly, because the reference would have
    the same error. Tokenizers are not compared, because transformers' LlamaTokenizer and SentencePiece differ for
    repeated spaces.
    """
    tolerance, output = TOLERANCES["huggingface"], _run_engine("transformers-source", folder, reference)
    assert tolerance.tie is not None
    if "error" in output:
        return [Check("source", "loads and runs", "yes", output["error"], False, output.get("remedy", ""))]
    return [
        _verify_continuations("source", reference, output, tolerance.tie),
        _verify_loss("source", reference, output, tolerance.nats),
    ]


def _unchanged_source(metadata: dict[str, Any]) -> Path | None:
    """Return the folder that a release of external weights was made from, or None if it was deleted or has changed."""
    source = metadata.get("initial_weights") or {}
    if metadata.get("step") is not None or "config" not in source or not Path(source["source"]).exists():
        return None
    try:
        llama = HuggingFaceLlama.open(source["source"])
        digests = (llama.digest, sha256_of(llama.folder / "config.json"))
    except InputError:  # the folder no longer contains a model
        return None
    return llama.folder if digests == (source["digest"], source["config"]) else None


def _verify_special_tokens(subject: str, reference: Reference, output: EngineOutput) -> Check:
    special, expected = output["special"], {"bos": reference["bos_id"], "eos": reference["eos_id"]}
    texts = [f"{ids['bos']}, {ids['eos']}" for ids in (expected, special)]
    return Check(subject, "bos, eos", texts[0], texts[1], special == expected)


def _verify_tokens(subject: str, reference: Reference, output: EngineOutput) -> Check:
    texts = reference["texts"]
    for entry, ids in zip(texts, output["texts"], strict=True):
        if ids != entry["ids"]:
            index = _first_difference(entry["ids"], ids)
            expected, found = (f"{tokens[max(0, index - 1) : index + 3]}" for tokens in (entry["ids"], ids))
            return Check(subject, "tokens", expected, f"{found} in {entry['text'][:20]!r}", False)
    total = f"{len(texts)} texts, {sum(len(entry['ids']) for entry in texts)} tokens"
    return Check(subject, "tokens", total, total, True)


def _verify_continuations(subject: str, reference: Reference, output: EngineOutput, tie: float) -> Check:
    """Compare continuations token by token, each up to its end or to a difference at a tie."""
    entries = reference["continuations"]
    num_equal = num_ties = 0
    for number, (entry, ids) in enumerate(zip(entries, output["continuations"], strict=True), 1):
        index = _first_difference(entry["ids"], ids)
        if index < len(entry["ids"]) and entry["margins"][index] >= tie:
            found = ids[index] if index < len(ids) else "no more"
            return Check(
                subject, "greedy", f"{entry['ids'][index]}", f"{found}, token {index + 1} after prompt {number}", False
            )
        num_equal += index
        num_ties += index < len(entry["ids"])
    ties = f"; {num_ties} stopped at a tie (margin under {tie:g})" if num_ties else ""
    total = sum(len(entry["ids"]) for entry in entries)
    return Check(subject, "greedy", f"{total} tokens", f"{num_equal} the same{ties}", True)


def _verify_loss(subject: str, reference: Reference, output: EngineOutput, tolerance: float) -> Check:
    scored, found = reference["scored"], output["nats_per_token"]
    expected, original = scored["nats_per_token"], scored.get("original_context")
    difference = found / expected - 1
    covered = f", {len(scored['ids']):,} tokens (original context {original:,})" if original else ""
    columns = (f"{expected:.4f} ± {tolerance:.2%}{covered}", f"{found:.4f} ({difference:+.3%})")
    return Check(subject, "nats per token", *columns, abs(difference) <= tolerance)


def _first_difference(expected: Sequence[int], found: Sequence[int]) -> int:
    pairs = enumerate(zip(expected, found, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(expected), len(found)))


def format_checks(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the lines of the table of checks, a line per crashed engine, and the overall result."""
    rows = [
        (check.subject, check.what, check.expected, check.found, "pass" if check.passed else "FAIL") for check in checks
    ]
    yield from format_table(("format", "check", "expected", "found", ""), rows)
    yield from dict.fromkeys(crash_line(check.found, check.remedy) for check in checks if check.remedy)
    num_failed = sum(not check.passed for check in checks)
    yield f"{num_failed} of {len(checks)} checks failed" if num_failed else f"all {len(checks)} checks passed"
