"""A Hugging Face Llama loads wherever a model is asked for; a folder that is none is refused by what differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.vocabularies import add_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tinyllama import cli
from tinyllama.errors import InputError
from tinyllama.files import read_json
from tinyllama.loading import HuggingFaceLlama, load_model, load_tokenizer
from tinyllama.model.generation import generate
from tinyllama.tokenizer import Tokenizer

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}
Change = Callable[[Path], str]


def write_llama(
    folder: Path, small: Path, shard: str = "1GB", dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A random Llama as transformers writes it, beside a tokenizer."""
    torch.manual_seed(5)
    pieces = Tokenizer.load(small / "tokenizer").vocab_size
    model = LlamaForCausalLM(LlamaConfig(vocab_size=pieces, **SHAPE | config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    for path in (small / "tokenizer").iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def template(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "peer", small)


@pytest.fixture
def llama(template: Path, tmp_path: Path) -> Path:
    """A folder of a test's own."""
    return Path(shutil.copytree(template, tmp_path / "peer"))


def with_a_head_in_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})


def with_another_head_in_the_file(folder: Path) -> None:
    """config.json and file contradict each other: transformers 5 takes the file's."""
    path = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(path)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    save_file(tensors | {"lm_head.weight": torch.randn(rows, 64) / 5}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text())
        places["weight_map"]["lm_head.weight"] = path.name
        index.write_text(json.dumps(places))


def in_older_words(folder: Path) -> None:
    """As transformers 4 wrote a config.json, with what may be left out left out."""
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    for name in ("attention_bias", "mlp_bias", "head_dim", "hidden_act", "tie_word_embeddings"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": None}))


def beside_an_old_index(folder: Path) -> None:
    """transformers reads the whole file where both are there."""
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        pytest.param({}, None, id="whole"),
        pytest.param({"shard": "60KB"}, None, id="sharded"),
        pytest.param({"tie_word_embeddings": True}, None, id="tied"),
        pytest.param({"tie_word_embeddings": True, "shard": "60KB"}, None, id="sharded-tied"),
        pytest.param({"tie_word_embeddings": True}, with_a_head_in_the_file, id="tied-with-a-head"),
        pytest.param({"tie_word_embeddings": True}, with_another_head_in_the_file, id="tied-with-another-head"),
        pytest.param(
            {"tie_word_embeddings": True, "shard": "60KB", "dtype": torch.bfloat16},
            with_another_head_in_the_file,
            id="sharded-tied-with-another-head",
        ),
        pytest.param({"num_key_value_heads": 4, "dtype": torch.bfloat16}, None, id="mha-bf16"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None, id="theta"),
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, in_older_words, id="older"),
        pytest.param({}, beside_an_old_index, id="whole-and-index"),
    ],
)
@torch.no_grad()
def test_logits_are_transformers(
    small: Path, tmp_path: Path, options: dict[str, Any], change: Callable[[Path], None] | None
) -> None:
    folder = write_llama(tmp_path / "peer", small, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == ("shard" in options)
    if change:
        change(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(400, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert (load_model(folder)(ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1  # or the comparison would say little


@pytest.mark.parametrize("change", [with_a_head_in_the_file, with_another_head_in_the_file])
def test_only_a_head_that_is_not_the_embedding_is_loaded_with_a_warning(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    folder = write_llama(tmp_path / "peer", small, tie_word_embeddings=True)
    change(folder)
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "import os", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err.splitlines()
    differs = change is with_another_head_in_the_file
    assert len(said) == differs
    assert all(line.startswith(f"{folder}: ") and "lm_head.weight" in line for line in said)
    assert (load_model(folder).head is not None) == differs


def test_a_release_is_a_model_from_outside_and_from_inside(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = tmp_path / "step-00000010"
    release.mkdir()
    shutil.copytree(llama, release / "huggingface")
    (release / "release.json").write_text("{}")
    capsys.readouterr()
    for source in (release, release / "huggingface", llama):
        opened = HuggingFaceLlama.open(source)  # what train.initial_weights does
        assert opened.digest == HuggingFaceLlama.open(llama).digest
        assert cli.main(["generate", str(source), "import os", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    tokenizer = load_tokenizer(release)
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("import os")]
    expected = tokenizer.decode([*ids, *generate(load_model(llama), ids, 4)])
    assert said == f"{expected}\n" * 3


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line with which a command refuses a folder, which it names."""
    capsys.readouterr()
    assert cli.main([*(command or ("generate",)), str(folder), *(() if command else ("import os",))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinyllama: ")
    assert str(folder) in line
    return line


def configured(**change: Any) -> Change:
    def apply(folder: Path) -> str:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        return ""

    return apply


def of_another_kind(text: str) -> Change:
    def apply(folder: Path) -> str:
        (folder / "config.json").write_text(text)
        return ""

    return apply


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 600}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (configured(model_type="gpt_neox"), "model_type is 'gpt_neox'; only Llama 2's 'llama' can be loaded"),
        (of_another_kind(json.dumps(GPT2)), "model_type is 'gpt2'"),
        (configured(rope_parameters=LLAMA3), "rope type is 'llama3'"),
        (configured(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope type is 'linear'"),
        (configured(attention_bias=True), "attention_bias is True"),
        (configured(mlp_bias=True), "mlp_bias is True"),
        (configured(head_dim=24), "head_dim is 24; only Llama 2's 16"),
        (configured(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (
            configured(quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantization_config is 'gptq'; only Llama 2's None can be loaded: save",
        ),
        (configured(quantization_config=4), "quantization_config is 4, not an object"),
        (configured(quantization_config="gptq"), "quantization_config is 'gptq', not an object"),
        (configured(rope_parameters=1), "rope_parameters is 1, not an object"),
        (configured(num_attention_heads=0), "heads: 0 should be greater than"),
        (configured(num_attention_heads=3), "heads 3 do not divide dim 64"),
        (configured(num_key_value_heads=3), "kv_heads 3 do not divide heads 4"),
        (configured(num_hidden_layers=None), "num_hidden_layers is None, not a number"),
        (configured(vocab_size="many"), "vocab_size is 'many', not a number"),
        (configured(vocab_size=1 << 63), "vocab_size is 9223372036854775808, not a number below 2^31"),
        (configured(vocab_size=-1), "vocab_size is -1, not a count"),
        (configured(vocab_size=0.5), "vocab_size is 0.5, not a count"),
        (of_another_kind('{"model_type": "llama"}'), "hidden_size is None, not a number below 2^31; correct it"),
        (of_another_kind("[]"), "config.json: a list, not an object"),
        (of_another_kind('{"model_type"'), "config.json: not valid JSON"),
    ],
)
def test_another_architecture_is_refused_by_the_field_that_differs(
    llama: Path, capsys: pytest.CaptureFixture[str], change: Change, wanted: str
) -> None:
    change(llama)
    assert wanted in refused(llama, capsys)


def without_a_shard(folder: Path) -> str:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "model-00002-of-00002.safetensors is missing"


def with_an_empty_index(folder: Path) -> str:
    without_a_shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json has no weight_map"


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors is missing; only safetensors load"


def as_a_pickle(folder: Path) -> str:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return "pytorch_model.bin is a pickle, which may run code as it loads: write it anew by transformers'"


def cut_off(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "model.safetensors cannot be read"


def not_fetched(folder: Path) -> str:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    return "; it is a git-lfs pointer: fetch the file itself with `git lfs pull`"


def with_more_layers(folder: Path) -> str:
    configured(num_hidden_layers=1)(folder)
    return "config.json has num_hidden_layers 1: fetch or make both again"


def with_biases(folder: Path) -> str:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, path)
    return "the weights hold model.layers.0.self_attn.q_proj.bias, which a Llama has no place for"


def without_a_head(folder: Path) -> str:
    path = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "lm_head.weight"}, path)
    return "the weights lack lm_head.weight; if the head is the embedding, set tie_word_embeddings to true"


def wider(folder: Path) -> str:
    configured(intermediate_size=128)(folder)
    return "blocks.0.ffn.gate_up.weight is [192, 64], but the model's is [256, 64]"


def without_a_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return "no tokenizer.json and no tokenizer.model in this folder"


def with_half_a_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    return "tokenizer.json: not valid JSON"


def with_another_file_as_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    return "tokenizer.json: not a valid tokenizer.json"


def with_half_a_sentencepiece_model(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    return "tokenizer.model: not a whole SentencePiece model"


def with_a_larger_tokenizer(folder: Path) -> str:
    document = json.loads((folder / "tokenizer.json").read_text())
    size = len(document["model"]["vocab"])
    document["model"]["vocab"]["▁spare"] = size
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return f"token '▁spare' has id {size}, but the weights have {size} rows"


def with_a_token_that_text_can_spell_beyond_the_weights(folder: Path) -> str:
    size = add_tokens(folder, "[PAD]", "<tool>", special=False)
    return f"token '[PAD]' has id {size}, but the weights have {size} rows"


def with_a_start_marker_beyond_the_weights(folder: Path) -> str:
    size = add_tokens(folder, "[BOS]")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "[BOS]"}))
    return f"token '[BOS]' has id {size}, but the weights have {size} rows"


def with_an_end_marker_beyond_the_weights(folder: Path) -> str:
    size = add_tokens(folder, "[PAD]", "[END]")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[END]"}))
    return f"token '[END]' has id {size + 1}, but the weights have {size} rows"


@pytest.mark.parametrize(
    "damage",
    [
        without_a_shard, with_an_empty_index, without_weights, as_a_pickle, cut_off, not_fetched, with_biases,
        with_more_layers, without_a_head, wider, without_a_tokenizer, with_half_a_tokenizer,
        with_another_file_as_tokenizer, with_half_a_sentencepiece_model, with_a_larger_tokenizer,
        with_a_token_that_text_can_spell_beyond_the_weights, with_a_start_marker_beyond_the_weights,
        with_an_end_marker_beyond_the_weights,
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named(llama: Path, capsys: pytest.CaptureFixture[str], damage: Change) -> None:
    wanted = damage(llama)
    assert wanted in refused(llama, capsys)


def test_special_tokens_beyond_the_weights_are_ignored_with_a_warning(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = load_tokenizer(llama)
    size = add_tokens(llama, "[PAD]", "<|user|>", "<|model|>", "<|end|>")
    capsys.readouterr()
    assert cli.main(["generate", str(llama), "[PAD] import os", "--max-new-tokens", "2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{llama}/tokenizer.json: [PAD] ({size}), ")
    assert "and 1 more" in line and f"{size} rows" in line
    tokenizer = load_tokenizer(llama)
    assert (tokenizer.vocab_size, tokenizer.digest) == (whole.vocab_size, whole.digest)
    assert tokenizer.encode("[PAD] import os") == whole.encode("[PAD] import os")


def test_a_llama_of_another_kind_is_scored_by_lm_evals_own_model(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    configured(rope_parameters=rope)(llama)
    scored = cli.main(["evaluate", str(llama), "--tasks", "winogrande", "--limit", "2", "--precision", "fp32"])
    assert scored == 0, capsys.readouterr().err
    assert read_json(llama / "evaluation.json")["rows"]["winogrande"]["items"] == 2


@pytest.mark.parametrize("name", ["nobody/no-such-model", "runs/none", "none"])
def test_what_is_nowhere_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_model(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_a_run_is_no_initial_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "commit.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-00000010: no config\.json; give a Hugging Face Llama's folder"):
        HuggingFaceLlama.open(checkpoint)
