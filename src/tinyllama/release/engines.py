"""One format in its real engine: what it says about the reference's texts, prompts and scored text.

A program of its own, since an engine may crash. `python -P engines.py ENGINE PATH OUT` reads the reference from
standard input and writes what was observed, or the error, as JSON to the file OUT. `python -P engines.py quantise
SOURCE PATH KIND` and `python -P engines.py convert SOURCE FOLDER KIND FILE...` write files. Of this package it imports
the filters of log messages and what ends a process with its parent.
"""

import ctypes
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama.errors import silence_torchao
from tinyllama.processes import set_parent_death_signal

# ruff: noqa: PLC0415 - each engine's library is imported only for its own format

PARENT = "--parent="
"""Begins the program's first argument: the number of the process with which it ends."""
Reference = dict[str, Any]
Observed = dict[str, Any]


def run_transformers(path: str, reference: Reference) -> Observed:
    """A Hugging Face folder, in float32."""
    model = _load_in_transformers(path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    texts = [tokenizer(entry["text"], split_special_tokens=True).input_ids for entry in reference["texts"]]
    special = {}
    for name in ("bos", "eos"):
        found = [getattr(part, f"{name}_token_id") for part in (tokenizer, model.config, model.generation_config)]
        expected = reference[f"{name}_id"]
        # a chat model may end at one of several tokens
        found = [expected if isinstance(value, list) and expected in value else value for value in found]
        special[name] = found[0] if found.count(found[0]) == len(found) else sorted(set(map(str, found)))
    return {"special": special, "texts": texts, **_computed_in_transformers(model, reference)}


def source_in_transformers(path: str, reference: Reference) -> Observed:
    """A folder of weights that a release is made from, rounded to bf16 as in the release; no tokenizer."""
    # padding is not computed here, and its id may be one that the embedding has no row for
    model = _load_in_transformers(path, pad_token_id=None)
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return _computed_in_transformers(model, reference)


def _load_in_transformers(path: str, **config: Any) -> Any:
    silence_torchao()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **config
    )


def _computed_in_transformers(model: Any, reference: Reference) -> Observed:
    """Greedy continuations and the loss, whatever the folder's generation_config.json asks for."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=reference["eos_id"], pad_token_id=reference["eos_id"])
    continuations = []
    for entry in reference["continuations"]:
        prompt, count = torch.tensor([entry["prompt_ids"]]), len(entry["ids"])
        length = {"max_new_tokens": count, "min_new_tokens": count}  # until then the end of a text is not taken
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
        continuations.append(ids[0, prompt.shape[1] :].tolist())
    scored = torch.tensor([reference["scored"]["ids"]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(scored).logits[0, :-1], scored[0, 1:])
    return {"continuations": continuations, "nats_per_token": float(loss)}


def run_llama_cpp(path: str, reference: Reference) -> Observed:
    """A GGUF file."""
    import numpy as np

    scored, entries = reference["scored"]["ids"], reference["continuations"]
    length = max([len(scored), *(len(entry["prompt_ids"]) + len(entry["ids"]) for entry in entries)])
    # one token at a time sees what a whole prompt sees only if the whole is one batch
    model = open_llama_cpp(path, n_ctx=length, n_batch=length, logits_all=True, n_threads=_threads())

    def logits(ids: list[int]) -> Any:
        model.eval(ids)
        return model.scores[model.n_tokens - len(ids) : model.n_tokens].astype(np.float64)

    continuations = []
    for entry in entries:
        model.reset()
        read, ids = entry["prompt_ids"], []
        for _ in entry["ids"]:
            last = logits(read)[-1]
            if reference["eos_id"] is not None:
                last[reference["eos_id"]] = -np.inf
            ids.append(int(last.argmax()))
            read = ids[-1:]
        continuations.append(ids)
    model.reset()
    rows = logits(scored)[:-1]
    top = rows.max(-1)
    nats = top + np.log(np.exp(rows - top[:, None]).sum(-1)) - rows[np.arange(len(rows)), scored[1:]]
    special = {"bos": model.token_bos(), "eos": model.token_eos()}
    return {
        "special": {name: None if number < 0 else number for name, number in special.items()},
        "texts": [model.tokenize(entry["text"].encode(), add_bos=True) for entry in reference["texts"]],
        "continuations": continuations,
        "nats_per_token": float(nats.mean()),
    }


def open_llama_cpp(path: str, verbose: bool = False, **options: Any) -> Any:
    """Return a `llama_cpp.Llama` whose weights are not repacked for this CPU.

    Where the CPU has AMX, repacked weights crash llama.cpp at two tokens or more (ggml-org/llama.cpp#20824). `Llama`
    takes its model parameters from `llama_model_default_params` and has no argument for `use_extra_bufts`.
    """
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = without_repacking
    try:
        return Llama(path, verbose=verbose, **options)
    finally:
        llama_cpp.llama_model_default_params = defaults


def quantise(source: str, path: str, kind: str) -> None:
    """Write a GGUF file of this kind, such as Q8_0, from one in F16."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # otherwise one line per tensor
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), _threads()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(parameters)):
        sys.exit(1)  # llama.cpp has logged the reason


def _threads() -> int:
    """As torch and CTranslate2 choose: llama.cpp would take no notice, and its threads spin on cores that are taken."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def run_ctranslate2(path: str, reference: Reference) -> Observed:
    """A CTranslate2 folder, with the tokenizer that lies in it; the engine itself reads and gives tokens' texts."""
    import ctranslate2
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    model = ctranslate2.Generator(path)
    config = json.loads((Path(path) / "config.json").read_text())

    def tokens(ids: list[int]) -> list[str]:
        return [tokenizer.id_to_token(number) for number in ids]

    continuations = []
    for entry in reference["continuations"]:
        count = len(entry["ids"])
        length = {"max_length": count, "min_length": count}  # until then the end of a text is not taken
        (found,) = model.generate_batch([tokens(entry["prompt_ids"])], include_prompt_in_result=False, **length)
        continuations.append([tokenizer.token_to_id(token) for token in found.sequences[0]])
    (scored,) = model.score_batch([tokens(reference["scored"]["ids"])], max_input_length=0)
    return {
        "special": {name: tokenizer.token_to_id(config[f"{name}_token"] or "") for name in ("bos", "eos")},
        "texts": [tokenizer.encode(entry["text"]).ids for entry in reference["texts"]],
        "continuations": continuations,
        "nats_per_token": -sum(scored.log_probs) / len(scored.log_probs),
    }


def convert(source: str, folder: str, kind: str, *files: str) -> None:
    """Write a CTranslate2 folder of this kind, such as int8_float32, from a Hugging Face folder, with these files."""
    silence_torchao()
    from ctranslate2.converters import TransformersConverter
    from transformers.utils import logging as transformers_logging

    class Converter(TransformersConverter):  # type: ignore[misc]
        def load_model(self, *arguments: Any, **options: Any) -> Any:
            """Copy the weights out of the mapped files, which would stay in memory until the last one is freed."""
            model = super().load_model(*arguments, **options)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            return model

    transformers_logging.disable_progress_bar()
    Converter(source, copy_files=list(files), trust_remote_code=False).convert(folder, quantization=kind)


ENGINES = {
    "transformers": run_transformers,
    "transformers-source": source_in_transformers,
    "llama_cpp": run_llama_cpp,
    "ctranslate2": run_ctranslate2,
}
CONVERSIONS: dict[str, Callable[..., None]] = {"quantise": quantise, "convert": convert}
"""Functions that write files."""


def main(engine: str, path: str, out: str, *more: str) -> None:
    """Observe, where an error of the engine is a result too, or convert."""
    if engine in CONVERSIONS:
        CONVERSIONS[engine](path, out, *more)
        return
    try:
        found = ENGINES[engine](path, json.load(sys.stdin))
    except Exception as error:  # whatever it is, it is why this format does not work
        found = {"error": " ".join(str(error).split()) or type(error).__name__}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1].startswith(PARENT):
        set_parent_death_signal(int(sys.argv.pop(1).removeprefix(PARENT)))
    main(*sys.argv[1:])
