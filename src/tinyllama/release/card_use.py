"""How a release is used in each engine: the card's snippets, which the tests run as they stand."""

from collections.abc import Iterable

_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("The file is opened", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""

_GGUF = """\
With llama.cpp, `llama-completion -m gguf/NAME-Q4_K_M.gguf -no-cnv --no-repack -p "The file is opened"` (before December
2025 the program was called `llama-cli`), or from Python:

```python
from llama_cpp import Llama, llama_cpp

defaults = llama_cpp.llama_model_default_params


def without_repacking():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters


llama_cpp.llama_model_default_params = without_repacking  # see below
model = Llama("gguf/NAME-Q4_K_M.gguf", verbose=False)  # in the release's folder; also -Q8_0 and -F16
completion = model("The file is opened", max_tokens=32, temperature=0)
print("The file is opened" + completion["choices"][0]["text"])
```

`--no-repack` and `use_extra_bufts = False` are needed for quantised files on Intel CPUs with AMX (`grep amx_int8
/proc/cpuinfo` prints something): llama.cpp crashes there when it repacks weights
([llama.cpp#20824](https://github.com/ggml-org/llama.cpp/issues/20824)). Other CPUs, and builds of llama.cpp with
`-DGGML_NATIVE=OFF`, run without either."""

_CTRANSLATE2 = """\
```python
import ctranslate2
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("ctranslate2/int8/tokenizer.json")  # in the release's folder; also float32
generator = ctranslate2.Generator("ctranslate2/int8")
start = tokenizer.encode("The file is opened").tokens
(result,) = generator.generate_batch([start], max_length=32)
print(tokenizer.decode(result.sequences_ids[0]))
```"""

_BY_FORMAT = {
    "huggingface": ("transformers", _TRANSFORMERS),
    "gguf": ("llama.cpp", _GGUF),
    "ctranslate2": ("CTranslate2", _CTRANSLATE2),
}


def usage_snippets(name: str, formats: Iterable[str]) -> str:
    """The engines of the formats that a release of this name has, a heading and a snippet each."""
    sections = [_BY_FORMAT[form] for form in _BY_FORMAT if form in {"huggingface", *formats}]
    return "\n\n".join(f"### {engine}\n\n{text.replace('NAME', name)}" for engine, text in sections)
