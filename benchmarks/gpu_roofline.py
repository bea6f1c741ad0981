"""Prints a roofline of one step of the 1.1B model per GPU: the least time of each kind of work, without overlap.

Work is bound by FLOP/s (matrix products, attention) or by memory traffic (the other rows), at the data sheet's rates.
The traffic is what the kernels that torch.compile and our loss launch read and write, at a micro-batch of 8 x 2,048
tokens and 131,072 tokens per step. Nothing here is measured. Also prints the number of kernels of a compiled block.

    python benchmarks/gpu_roofline.py
"""

import re

import torch
from torch._inductor.utils import run_fw_bw_and_get_code

from tinyllama.hardware import HARDWARE_SPECS
from tinyllama.model.flops import (
    LLAMA_2_VOCAB_SIZE,
    flops_per_token,
    loss_chunk_tokens,
    num_parameters,
    parameters_by_part,
)
from tinyllama.model.llama import Block
from tinyllama.model.rope import rope_table
from tinyllama.recipe import Model, Recipe

GPUS = {"a100-40g": 1.555e12, "h100": 3.35e12, "h200": 4.8e12}
"""Memory bandwidth in bytes per second, from the data sheets of HARDWARE_SPECS."""
SEQUENCES, MICRO_BATCHES = 8, 8
CALLS = {
    "matrix products": r"^\s+extern_kernels\.mm\(",
    "attention": r"torch\.ops\.tinyllama\.causal_attention\w*\.default\(",
    "fused kernels": r"^\s+cpp_fused\w*\(",
}
"""Patterns of the calls in inductor's code."""


def main() -> None:
    """Print the table in milliseconds per step."""
    recipe = Recipe.load("tinyllama-1.1b")
    tokens = SEQUENCES * recipe.train.sequence_length
    flops, traffic = step_flops(recipe, tokens), step_traffic(recipe, tokens)
    print("| ms per step of 131,072 tokens | " + " | ".join(GPUS) + " |")
    print("| --- " * (len(GPUS) + 1) + "|")
    totals = dict.fromkeys(GPUS, 0.0)
    for kind, amount in (flops | traffic).items():
        cells = []
        for name, bandwidth in GPUS.items():
            rate = HARDWARE_SPECS[name].bf16_flops if kind in flops else bandwidth
            totals[name] += amount / rate
            cells.append(f"{1e3 * amount / rate:.1f}")
        print(f"| {kind} | {' | '.join(cells)} |")
    print(f"| total | {' | '.join(f'{1e3 * total:.0f}' for total in totals.values())} |")
    total_flops = (
        flops_per_token(recipe.model, LLAMA_2_VOCAB_SIZE, recipe.train.sequence_length) * tokens * MICRO_BATCHES
    )
    bounds = (total_flops / HARDWARE_SPECS[name].bf16_flops / total for name, total in totals.items())
    print(f"| upper bound of the MFU | {' | '.join(f'{100 * bound:.0f} %' for bound in bounds)} |")
    print_launches(recipe)


def print_launches(recipe: Recipe) -> None:
    """Print how many kernels a compiled block launches, counted in inductor's code of a narrow block for CPUs."""
    shape = {"dim": 256, "heads": 4, "kv_heads": 2, "ffn_dim": 512}
    model = Model.model_validate(recipe.model.model_dump() | shape)  # computes `head_dim`
    block, rope = torch.compile(Block(model), dynamic=False), rope_table(model, 128)
    x = torch.randn(2, 128, model.dim, dtype=torch.bfloat16, requires_grad=True)
    _, codes = run_fw_bw_and_get_code(lambda: block(x, rope))
    for name, code in zip(("forward", "backward"), codes, strict=True):
        counts = {kind: len(re.findall(pattern, code, re.MULTILINE)) for kind, pattern in CALLS.items()}
        print(f"{name} pass of a block: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")


def step_flops(recipe: Recipe, tokens: int) -> dict[str, float]:
    """Return the FLOPs of a step, forward and backward, by kind of work."""
    model = recipe.model
    attention = 6 * model.layers * model.heads * model.head_dim * recipe.train.sequence_length * tokens * MICRO_BATCHES
    total = flops_per_token(model, LLAMA_2_VOCAB_SIZE, recipe.train.sequence_length) * tokens * MICRO_BATCHES
    return {"matrix products": total - attention, "attention": attention}


def step_traffic(recipe: Recipe, tokens: int) -> dict[str, float]:
    """Return the bytes that memory-bound kernels read and write in a step, by kind of work."""
    model, vocab = recipe.model, LLAMA_2_VOCAB_SIZE
    heads, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    # forward pass of a block in bf16: two norms (read, write), rotary embedding of queries and keys (read, write), two
    # residual sums (read two, write one), SwiGLU (read two, write one); the backward pass moves twice as much
    block = 2 * tokens * (2 * 2 * model.dim + 2 * (heads + keys) + 2 * 3 * model.dim + 3 * model.ffn_dim)
    # logits: written and read by two products, copied to float32, softmax in float32, maximum, and copy back
    logits = tokens * vocab * (2 + 2 * 2 + (2 + 4) + (4 + 4) + 2 + (4 + 2))
    chunks = -(-tokens // loss_chunk_tokens(vocab, is_cpu=False))
    head_gradient = chunks * vocab * model.dim * (2 + 4 + 4)
    matrices = sum(
        count for name, count in parameters_by_part(model, vocab).items() if name not in ("embedding", "norms")
    )
    casts = matrices * (4 + 2)  # weights to bf16, once per step
    gradients = matrices * (2 + 4 + 4)  # bf16 gradients added to float32 sums
    parameters = num_parameters(model, vocab)
    return {
        "norms, rotary embedding, residuals, SwiGLU": 3 * block * model.layers * MICRO_BATCHES,
        "logits": logits * MICRO_BATCHES,
        "gradient of the output head, accumulated over the chunks of the loss": head_gradient * MICRO_BATCHES,
        "casts of the weights to bf16": casts,
        "accumulation of the gradients in float32": gradients * MICRO_BATCHES,
        "gradient clipping": parameters * (4 + 4 + 4),
        "AdamW": parameters * (4 * 4 + 3 * 4),
    }


if __name__ == "__main__":
    main()
