"""Engines that run the formats of a release; each runs in a child process, so a crash does not stop the command.

This file is also the program of the child process. `python -P engines.py ENGINE PATH OUT` reads the reference from
standard input and writes the engine's output, or its error, as JSON to OUT. `python -P engines.py quantise SOURCE PATH
KIND` and `python -P engines.py convert SOURCE FOLDER KIND FILE...` convert a format.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinyllama.errors import RunStoppedError, silence_torchao
from tinyllama.processes import set_parent_death_signal

# ruff: noqa: PLC0415 - each engine's library is imported only in the child process that needs it

ENGINE_NAMES = {"transformers": "transformers", "llama_cpp": "llama.cpp", "ctranslate2": "CTranslate2"}
"""Name of each library in messages."""
_CRASH_REMEDIES = {
    "llama_cpp": "rebuild llama.cpp for any x86-64 CPU: CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall "
    "--no-cache-dir --no-deps llama-cpp-python (docs/engines.md)",
    "ctranslate2": "install another version of ctranslate2, or use another machine",
    "transformers": "install other versions of torch and transformers, or use another machine",
}
_PARENT = "--parent="
"""Prefix of the child's first argument, which contains the parent's process id. The child ends when the parent ends."""
Reference = dict[str, Any]
EngineOutput = dict[str, Any]


def run_engine(engine: str, path: Path, reference: Reference) -> EngineOutput:
    """Run an engine, and return its outputs for the reference's texts, prompts and scored text.

    If the engine failed, the result contains only the error message, as `error`. If a signal ended the engine, the
    result also contains a `remedy`, because a crash does not show that the file is invalid.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "output.json"
        ended = _run([engine, str(path), str(out)], json.dumps(reference).encode())
        if out.is_file():
            output: EngineOutput = json.loads(out.read_text())
            return output
    library = engine.removesuffix("-source")
    if ended.returncode >= 0:
        return {"error": f"{ENGINE_NAMES[library]} ended with status {ended.returncode}{_last_line(ended.stderr)}"}
    message, remedy = _describe_crash(library, ended.returncode)
    return {"error": message + _last_line(ended.stderr), "remedy": remedy}


def run_conversion(library: str, function: str, *arguments: str) -> None:
    """Run a function of CONVERSIONS, which uses `library`, in a child process.

    Raises RunStoppedError if the conversion fails. The message contains the last line that the library printed, or the
    signal that ended the process.
    """
    ended = _run([function, *arguments], b"")
    if ended.returncode < 0:
        message, remedy = _describe_crash(library, ended.returncode)
        raise RunStoppedError(f"release: {message}{_last_line(ended.stderr)}; {remedy}")
    if ended.returncode:
        raise RunStoppedError(
            f"release: {ENGINE_NAMES[library]} could not {function}{_last_line(ended.stderr)}; "
            f"release without this format (--formats), or install another version of {ENGINE_NAMES[library]}"
        )


def crash_line(error: str, remedy: str) -> str:
    """Return a line that reports a crash, from the `error` and the `remedy` that `run_engine` returned."""
    return f"{error}, which does not show that the file is invalid; {remedy}"


def _describe_crash(library: str, returncode: int) -> tuple[str, str]:
    """Return the message and the remedy for a library whose process was killed by a signal."""
    name = signal.Signals(-returncode).name
    if name == "SIGKILL":  # sent by another process, or by the kernel when memory runs out
        return (
            f"{ENGINE_NAMES[library]} was killed (SIGKILL)",
            "free some memory or raise the memory limit, and run this again",
        )
    return f"{ENGINE_NAMES[library]} crashed ({name}) on this machine", _CRASH_REMEDIES[library]


def _run(arguments: list[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    # Without -P, modules in this folder would shadow libraries of the same name.
    command = [sys.executable, "-P", __file__, f"{_PARENT}{os.getpid()}", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""


# The functions below run in the child process.


def run_transformers(path: str, reference: Reference) -> EngineOutput:
    """Run a Hugging Face folder in transformers with float32."""
    model = _load_in_transformers(path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    texts = [tokenizer(entry["text"], split_special_tokens=True).input_ids for entry in reference["texts"]]
    special = {}
    for name in ("bos", "eos"):
        found = [getattr(holder, f"{name}_token_id") for holder in (tokenizer, model.config, model.generation_config)]
        expected = reference[f"{name}_id"]
        # a chat model may have several EOS tokens
        found = [expected if isinstance(value, list) and expected in value else value for value in found]
        special[name] = found[0] if found.count(found[0]) == len(found) else sorted(set(map(str, found)))
    return {"special": special, "texts": texts, **_compute_in_transformers(model, reference)}


def run_source_in_transformers(path: str, reference: Reference) -> EngineOutput:
    """Run external weights in transformers, rounded to bf16 as in the release; their tokenizer is not loaded."""
    # remove the folder's padding id, which may have no row in the embedding; no text is padded here
    model = _load_in_transformers(path, pad_token_id=None)
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return _compute_in_transformers(model, reference)


def _load_in_transformers(path: str, **config: Any) -> Any:
    silence_torchao()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **config
    )


def _compute_in_transformers(model: Any, reference: Reference) -> EngineOutput:
    """Return greedy continuations and the loss, without the folder's generation_config.json."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=reference["eos_id"], pad_token_id=reference["eos_id"])
    continuations = []
    for entry in reference["continuations"]:
        prompt, count = torch.tensor([entry["prompt_ids"]]), len(entry["ids"])
        length = {"max_new_tokens": count, "min_new_tokens": count}  # prevents EOS before `count` tokens
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
        continuations.append(ids[0, prompt.shape[1] :].tolist())
    scored = torch.tensor([reference["scored"]["ids"]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(scored).logits[0, :-1], scored[0, 1:])
    return {"continuations": continuations, "nats_per_token": float(loss)}


def run_llama_cpp(path: str, reference: Reference) -> EngineOutput:
    """Run a GGUF file in llama.cpp."""
    import numpy as np

    scored, entries = reference["scored"]["ids"], reference["continuations"]
    length = max([len(scored), *(len(entry["prompt_ids"]) + len(entry["ids"]) for entry in entries)])
    # one batch for all tokens, because a prompt that is split into several batches would produce different logits
    model = open_llama_cpp(path, n_ctx=length, n_batch=length, logits_all=True, n_threads=_num_threads())

    def logits(ids: list[int]) -> Any:
        model.eval(ids)
        return model.scores[model.n_tokens - len(ids) : model.n_tokens]

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
    # row by row, because the float64 logits of a long text may need more memory than the model
    rows = (row.astype(np.float64) for row in logits(scored)[:-1])
    nats = [np.logaddexp.reduce(row) - row[token] for row, token in zip(rows, scored[1:], strict=True)]
    special = {"bos": model.token_bos(), "eos": model.token_eos()}
    return {
        "special": {name: None if number < 0 else number for name, number in special.items()},
        "texts": [model.tokenize(entry["text"].encode(), add_bos=True) for entry in reference["texts"]],
        "continuations": continuations,
        "nats_per_token": float(np.mean(nats)),
    }


def open_llama_cpp(path: str, verbose: bool = False, **options: Any) -> Any:
    """Return a `llama_cpp.Llama` whose weights are not repacked for this CPU.

    On CPUs with AMX, llama.cpp crashes if the weights are repacked and a batch has two or more tokens
    (ggml-org/llama.cpp#20824). `Llama` has no argument for `use_extra_bufts`, so this function replaces
    `llama_model_default_params`, from which `Llama` takes its model parameters.
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
    """Convert an F16 GGUF file to a quantised type such as Q8_0."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # otherwise llama.cpp prints one line per tensor
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), _num_threads()
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(parameters)):
        sys.exit(1)  # llama.cpp has logged the reason


def _num_threads() -> int:
    """Return the number of threads for llama.cpp, because its default ignores OMP_NUM_THREADS."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def run_ctranslate2(path: str, reference: Reference) -> EngineOutput:
    """Run a CTranslate2 folder with its tokenizer, since the engine reads and returns tokens, not text."""
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
        length = {"max_length": count, "min_length": count}  # prevents EOS before `count` tokens
        (result,) = model.generate_batch([tokens(entry["prompt_ids"])], include_prompt_in_result=False, **length)
        continuations.append([tokenizer.token_to_id(token) for token in result.sequences[0]])
    (scored,) = model.score_batch([tokens(reference["scored"]["ids"])], max_input_length=0)
    return {
        "special": {name: tokenizer.token_to_id(config[f"{name}_token"] or "") for name in ("bos", "eos")},
        "texts": [tokenizer.encode(entry["text"]).ids for entry in reference["texts"]],
        "continuations": continuations,
        "nats_per_token": -sum(scored.log_probs) / len(scored.log_probs),
    }


def convert(source: str, folder: str, kind: str, *files: str) -> None:
    """Convert a Hugging Face folder to a CTranslate2 folder of a type such as int8_float32; also copy `files`."""
    silence_torchao()
    from ctranslate2.converters import TransformersConverter
    from transformers.utils import logging as transformers_logging

    settings = _ctranslate2_settings(source)

    class Converter(TransformersConverter):  # type: ignore[misc]
        def _load(self) -> Any:
            """Return the converted model with the attention settings that the engine reads but the converter omits.

            Without these settings, CTranslate2 applies no scaling of Llama 3, and assumes heads of width dim / heads.
            """
            specification = super()._load()
            for layer in specification.decoder.layer:
                vars(layer.self_attention).update(settings)
            return specification

        def load_model(self, *arguments: Any, **options: Any) -> Any:
            """Load a model and copy its weights; a mapped file would stay in memory until its last weight is freed."""
            model = super().load_model(*arguments, **options)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            return model

    transformers_logging.disable_progress_bar()
    Converter(source, copy_files=list(files), trust_remote_code=False).convert(folder, quantization=kind)


def _ctranslate2_settings(source: str) -> dict[str, Any]:
    """Return attention settings of CTranslate2 from a config.json."""
    import numpy as np

    config = json.loads((Path(source) / "config.json").read_text())
    rope = config["rope_parameters"]
    settings: dict[str, Any] = {"head_dim": np.int32(config["head_dim"])}
    if rope["rope_type"] == "llama3":
        settings["rotary_scaling_factor"] = np.float32(rope["factor"])
        settings["original_max_position_embeddings"] = np.int32(rope["original_max_position_embeddings"])
    return settings


ENGINES = {
    "transformers": run_transformers,
    "transformers-source": run_source_in_transformers,
    "llama_cpp": run_llama_cpp,
    "ctranslate2": run_ctranslate2,
}
CONVERSIONS: dict[str, Callable[..., None]] = {"quantise": quantise, "convert": convert}
"""Conversions of the child process, by name."""


def main(engine: str, path: str, out: str, *more: str) -> None:
    """Run a conversion, or run an engine and write its outputs or its error to `out`."""
    if engine in CONVERSIONS:
        CONVERSIONS[engine](path, out, *more)
        return
    try:
        output = ENGINES[engine](path, json.load(sys.stdin))
    except Exception as error:  # any exception shows that the format does not work
        output = {"error": " ".join(str(error).split()) or type(error).__name__}
    Path(out).write_text(json.dumps(output))


if __name__ == "__main__":
    if sys.argv[1].startswith(_PARENT):
        set_parent_death_signal(int(sys.argv.pop(1).removeprefix(_PARENT)))
    main(*sys.argv[1:])
