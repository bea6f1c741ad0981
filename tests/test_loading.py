"""A Hugging Face Llama loads wherever a model is expected; any other folder is refused with the reason."""

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

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Edit = Callable[[Path], object]


def write_llama(
    folder: Path, small: Path, shard: str = "1GB", dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Write a random Llama with transformers, and a tokenizer next to it."""
    torch.manual_seed(5)
    vocab_size = Tokenizer.load(small / "tokenizer").vocab_size
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **CONFIG | config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    shutil.copytree(small / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def template(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "peer", small)


@pytest.fixture
def llama(template: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder that the test may change."""
    return Path(shutil.copytree(template, tmp_path / "peer"))


def edit_json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_config(**change: Any) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **change)


def write_config(text: str) -> Edit:
    return lambda folder: (folder / "config.json").write_text(text)


def add_equal_head(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def add_different_head(folder: Path) -> None:
    """Add a head although config.json ties the embeddings: transformers 5 uses the head."""
    path = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    rows = read_json(folder / "config.json")["vocab_size"]
    save_file(load_file(path) | {"lm_head.weight": torch.randn(rows, 64) / 5}, path, {"format": "pt"})
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX)["weight_map"]
        edit_json(folder / INDEX, weight_map=places | {"lm_head.weight": path.name})


def write_config_of_transformers_4(folder: Path) -> None:
    config = read_json(folder / "config.json")
    scaling = config.pop("rope_parameters")
    theta = scaling.pop("rope_theta")
    is_default = scaling == {"rope_type": "default"}
    for name in ("attention_bias", "mlp_bias", "head_dim", "hidden_act", "tie_word_embeddings"):
        config.pop(name, None)
    rope = {"rope_theta": theta, "rope_scaling": None if is_default else scaling}
    (folder / "config.json").write_text(json.dumps(config | rope))


def write_old_name_of_rope_type(folder: Path) -> None:
    write_config_of_transformers_4(folder)
    scaling = read_json(folder / "config.json")["rope_scaling"]
    edit_json(folder / "config.json", rope_scaling={"type": scaling.pop("rope_type"), **scaling})


def add_old_index(folder: Path) -> None:
    """Add an index of missing shards: transformers reads the single file if both exist."""
    write_index(folder, "model-00001-of-00009.safetensors")


def write_index(folder: Path, name: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


TIED: dict[str, Any] = {"tie_word_embeddings": True}
THETA: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(
    ("options", "edit"),
    [
        pytest.param({}, None, id="plain"),
        pytest.param({"shard": "60KB"}, None, id="sharded"),
        pytest.param(TIED, None, id="tied"),
        pytest.param(TIED | {"shard": "60KB"}, None, id="sharded-tied"),
        pytest.param(TIED, add_equal_head, id="tied-with-head"),
        pytest.param(TIED, add_different_head, id="tied-with-different-head"),
        pytest.param(
            TIED | {"shard": "60KB", "dtype": torch.bfloat16}, add_different_head, id="sharded-different-head"
        ),
        pytest.param({"num_key_value_heads": 4, "dtype": torch.bfloat16}, None, id="mha-bf16"),
        pytest.param(THETA, None, id="theta"),
        pytest.param(THETA, write_config_of_transformers_4, id="transformers-4"),
        pytest.param({}, add_old_index, id="single-file-and-index"),
        pytest.param({"head_dim": 32}, None, id="wide-heads"),
        pytest.param({"rope_parameters": LINEAR}, None, id="linear"),
        pytest.param({"rope_parameters": LINEAR}, write_old_name_of_rope_type, id="linear-transformers-4"),
        pytest.param(TIED | {"rope_parameters": LLAMA3, "head_dim": 12}, None, id="llama3-tied-narrow-heads"),
        pytest.param({"rope_parameters": LLAMA3}, write_config_of_transformers_4, id="llama3-transformers-4"),
    ],
)
@torch.no_grad()
def test_logits_equal_transformers(small: Path, tmp_path: Path, options: dict[str, Any], edit: Edit | None) -> None:
    folder = write_llama(tmp_path / "peer", small, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == ("shard" in options)
    if edit:
        edit(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(400, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert (load_model(folder)(ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1  # otherwise any logits would be close


@pytest.mark.parametrize("edit", [add_equal_head, add_different_head])
def test_different_head_of_tied_model_loads_with_warning(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit
) -> None:
    folder = write_llama(tmp_path / "peer", small, **TIED)
    edit(folder)
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "import os", "--max-new-tokens", "2", "--quiet"]) == 0
    warnings = capsys.readouterr().err.splitlines()
    is_different = edit is add_different_head
    assert len(warnings) == is_different
    assert all(line.startswith(f"{folder}: ") and "lm_head.weight" in line for line in warnings)
    assert (load_model(folder).head is not None) == is_different


def test_release_and_its_huggingface_folder_are_one_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = tmp_path / "step-00000010"
    shutil.copytree(llama, release / "huggingface")
    (release / "release.json").write_text("{}")
    capsys.readouterr()
    for source in (release, release / "huggingface", llama):
        assert HuggingFaceLlama.open(source).digest == HuggingFaceLlama.open(llama).digest
        assert cli.main(["generate", str(source), "import os", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    output = capsys.readouterr().out
    tokenizer = load_tokenizer(release)
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("import os")]
    expected = tokenizer.decode([*ids, *generate(load_model(llama), ids, 4)])
    assert output == f"{expected}\n" * 3


@torch.no_grad()
def test_generation_beyond_the_original_context_equals_transformers(small: Path, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "peer", small, rope_parameters=LLAMA3)
    prompt = torch.randint(400, (1, 30), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False)[0, 30:].tolist()
    assert list(generate(load_model(folder), prompt[0].tolist(), 30)) == expected
    assert len(set(expected)) > 5  # otherwise a wrong model could give the same tokens


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which `generate` refuses a folder."""
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "import os"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinyllama: ")
    assert str(folder) in line
    return line


ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 600}


@pytest.mark.parametrize(
    ("edit", "field", "value"),
    [
        (edit_config(model_type="gpt_neox"), "model_type", "gpt_neox"),
        (write_config(json.dumps(GPT2)), "model_type", "gpt2"),
        (edit_config(rope_parameters=YARN), "rope_type", "yarn"),
        (edit_config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}), "type", "dynamic"),
        (edit_config(rope_parameters=YARN | {"rope_type": "longrope"}), "rope_type", "longrope"),
        (edit_config(rope_parameters={"rope_type": "linear"}), "factor", "missing"),
        (edit_config(rope_parameters=LINEAR | {"factor": 0.5}), "factor", "0.5"),
        (edit_config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor", "needs"),
        (edit_config(rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}), "low_freq_factor", "4"),
        (edit_config(rope_parameters=LINEAR | {"rope_type": "default"}), "factor", "3.0, but rope_type is default"),
        (edit_config(rope_parameters=LLAMA3, **{ORIGINAL: 32}), ORIGINAL, "both 16 and 32"),
        (edit_config(rope_parameters={**LLAMA3, ORIGINAL: None}), f" {ORIGINAL}", "needs"),
        (edit_config(rope_parameters=LLAMA3, max_position_embeddings=256), " max_position_embeddings", "256"),
        (edit_config(rope_parameters=LLAMA3, rope_theta=5e5), "rope_theta", "500000"),
        (edit_config(rope_parameters=LLAMA3, rope_scaling=LLAMA3 | {"factor": 8.0}), "factor", "8.0"),
        (edit_config(rope_parameters=LLAMA3, rope_scaling=LINEAR), "rope_type", "linear"),
        (edit_config(rope_parameters=LINEAR | {"type": "llama3"}), "rope_type", "llama3"),
        (edit_config(rope_parameters=1), "rope_parameters", "1"),
        (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor", "0.5"),
        (edit_config(attention_bias=True), "attention_bias", "True"),
        (edit_config(mlp_bias=True), "mlp_bias", "True"),
        (edit_config(head_dim=9), "head_dim", "9"),
        (edit_config(hidden_act="gelu"), "hidden_act", "gelu"),
        (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config", "quantized"),
        (edit_config(quantization_config=4), "quantization_config", "4"),
        (edit_config(num_attention_heads=0), "heads", "0"),
        (edit_config(num_attention_heads=3), "heads 3", "dim 64"),
        (edit_config(num_key_value_heads=3), "kv_heads 3", "heads 4"),
        (edit_config(num_hidden_layers=None), "num_hidden_layers", "None"),
        (edit_config(vocab_size="many"), "vocab_size", "many"),
        (edit_config(vocab_size=1 << 63), "vocab_size", "9223372036854775808"),
        (edit_config(vocab_size=-1), "vocab_size", "-1"),
        (edit_config(vocab_size=0.5), "vocab_size", "0.5"),
        (write_config('{"model_type": "llama"}'), "hidden_size", "missing"),
        (write_config("[]"), "config.json", "dictionary"),
        (write_config('{"model_type"'), "config.json", "valid JSON"),
    ],
)
def test_other_architecture_is_refused_by_field(
    llama: Path, capsys: pytest.CaptureFixture[str], edit: Edit, field: str, value: str
) -> None:
    edit(llama)
    line = refusal(llama, capsys)
    assert field in line
    assert value in line


def remove_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    write_index(folder, "model-00002-of-00002.safetensors")


def empty_index(folder: Path) -> None:
    remove_shard(folder)
    (folder / INDEX).write_text("{}")


def convert_to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncate(name: str, size: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write_lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def add_bias(folder: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file(load_file(folder / WEIGHTS) | bias, folder / WEIGHTS)


def remove_head(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS)


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink(missing_ok=True)


def write_incomplete_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')


def write_incomplete_sentencepiece_model(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")


def add_text_token(folder: Path) -> None:
    model = read_json(folder / "tokenizer.json")["model"]
    vocabulary = model["vocab"] | {"▁spare": len(model["vocab"])}
    edit_json(folder / "tokenizer.json", model=model | {"vocab": vocabulary})


def add_special_tokens(*texts: str, special: bool = True, **settings: str) -> Edit:
    def edit(folder: Path) -> None:
        add_tokens(folder, *texts, special=special)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    return edit


@pytest.mark.parametrize(
    ("damage", "keywords"),
    [
        (remove_shard, "model-00002-of-00002.safetensors: is missing"),
        (empty_index, "model.safetensors.index.json: has no weight_map"),
        (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors: is missing"),
        (convert_to_pickle, "pytorch_model.bin is a pickle"),
        (truncate(WEIGHTS, -100), "model.safetensors: cannot be read"),
        (write_lfs_pointer, "git lfs pull"),
        (add_bias, "q_proj.bias"),
        (edit_config(num_hidden_layers=1), "num_hidden_layers 1"),
        (remove_head, "lm_head.weight"),
        (edit_config(intermediate_size=128), "blocks.0.ffn.gate_up.weight"),
        (remove_tokenizer, "no tokenizer.json and no tokenizer.model"),
        (truncate("tokenizer.json", 1000), "tokenizer.json: not valid JSON"),
        (write_incomplete_tokenizer, "tokenizer.json: not a valid tokenizer.json"),
        (write_incomplete_sentencepiece_model, "tokenizer.model: not a"),
        (add_text_token, "'▁spare' has id 600"),
        (add_special_tokens("[PAD]", "<tool>", special=False), "'[PAD]' has id 600"),
        (add_special_tokens("[BOS]", bos_token="[BOS]"), "'[BOS]' has id 600"),
        (add_special_tokens("[PAD]", "[END]", eos_token="[END]"), "'[END]' has id 601"),
    ],
)
def test_damaged_model_is_refused_by_name(
    llama: Path, capsys: pytest.CaptureFixture[str], damage: Edit, keywords: str
) -> None:
    damage(llama)
    assert keywords in refusal(llama, capsys)


def test_special_tokens_beyond_the_embedding_are_dropped_with_warning(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = load_tokenizer(llama)
    size = add_tokens(llama, "[PAD]", "<|user|>", "<|model|>", "<|end|>")
    capsys.readouterr()
    assert cli.main(["generate", str(llama), "[PAD] import os", "--max-new-tokens", "2", "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{llama}/tokenizer.json: ")
    assert f"[PAD] ({size}), " in line and "and 1 more" in line
    tokenizer = load_tokenizer(llama)
    assert (tokenizer.vocab_size, tokenizer.digest) == (original.vocab_size, original.digest)
    assert tokenizer.encode("[PAD] import os") == original.encode("[PAD] import os")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "runs/none", "none"])
def test_unknown_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_model(name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_checkpoint_is_no_initial_weights(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "commit.json").write_text("{}")
    with pytest.raises(InputError, match=r"step-00000010: no config\.json"):
        HuggingFaceLlama.open(checkpoint)
