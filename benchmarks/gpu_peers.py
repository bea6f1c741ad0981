"""Training speed of other libraries at the shape of the 1.1B model on one GPU, for benchmarks/gpu.py.

transformers trains its LlamaForCausalLM with float32 weights under bf16 autocast, the same attention kernel, torch's
fused AdamW and torch.compile. torchtitan trains its llama3 with the bf16 policy of its own trainer, if it is installed.
Each library's blocks are compiled one by one, since compiling all blocks as one graph would take a minute. The loss of
both peers is compiled too. tinyllama runs in the same process. A step has 131,072 tokens.
"""

import statistics
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_speed import failure, load_recipe, num_rounds, release_memory, time_step, timed_model
from torch import Tensor
from torch.nn import functional as F

from tinyllama.model.flops import LLAMA_2_VOCAB_SIZE
from tinyllama.plan.measure import time_call
from tinyllama.recipe import Recipe

# ruff: noqa: PLC0415 - each peer is imported only where it runs

Loss = Callable[[Tensor, Tensor], Tensor]


def peers(device: str) -> Iterator[dict[str, Any]]:
    """Yield tokens per second and peak memory of tinyllama and of each installed library."""
    recipe = load_recipe("tinyllama-1.1b", device, {})
    programs = {"transformers": measure_transformers, "tinyllama": measure_ours, "torchtitan": measure_torchtitan}
    for name, program in programs.items():
        try:
            row: dict[str, Any] = {"library": name, "version": version(name)}
        except PackageNotFoundError:
            yield {"library": name, "note": "not installed"}
            continue
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            micro_batch, update = program(recipe, torch.device(device))
            micro_batches = recipe.train.batch_sequences // recipe.train.effective_micro_batch_size(1)
            row["tokens/s"] = recipe.train.batch_tokens / (micro_batches * micro_batch + update)
        except Exception as error:  # a peer's failure must not end the others
            row |= failure(error)
        if device == "cuda":
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        yield row
        release_memory()


def measure_ours(recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Return tinyllama's times; see `gpu_speed.time_step`."""
    return time_step(timed_model(recipe, device))


def measure_transformers(recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Return the times of a compiled LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = recipe.model
    config = LlamaConfig(
        vocab_size=LLAMA_2_VOCAB_SIZE,
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.norm_eps,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    compiled = torch.compile(cross_entropy, dynamic=False)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return compiled(model(inputs).logits, targets)

    return time_training(model, loss, recipe, device)


def measure_torchtitan(recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Return the times of torchtitan's llama3, each of whose blocks is compiled."""
    import training_titan

    job = recipe.model.model_dump() | {"vocab_size": LLAMA_2_VOCAB_SIZE}
    with torch.device(device):
        model = training_titan.model_spec(job).model.build()
    for layer in model.layers.values():
        layer.compile(dynamic=False)
    compiled = torch.compile(cross_entropy, dynamic=False)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(inputs.shape[1], device=device).expand(len(inputs), -1)
        return compiled(model(inputs, positions=positions), targets)

    return time_training(model, loss, recipe, device)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits[B, T, V], in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def time_training(model: torch.nn.Module, loss: Loss, recipe: Recipe, device: torch.device) -> tuple[float, float]:
    """Return the time of a forward and backward pass under bf16 autocast and of an AdamW step, in seconds."""
    sequences = recipe.train.effective_micro_batch_size(1)
    ids = torch.randint(LLAMA_2_VOCAB_SIZE, (sequences, recipe.train.sequence_length + 1), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def micro_batch() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(ids[:, :-1], ids[:, 1:])
        value.backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for call in (micro_batch, update):
        call()
    with torch.compiler.set_stance("fail_on_recompile"):
        return (
            statistics.median(time_call(micro_batch) for _ in range(num_rounds(device))),
            statistics.median(time_call(update) for _ in range(num_rounds(device))),
        )
