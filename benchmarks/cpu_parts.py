"""Time of the parts of a training step on this machine's CPU, to compare variants and to find the slowest part.

The shapes are "small" (benchmarks/training.py) and that of the demo. The variants of a part take turns. A time is the
median of the rounds: CPU time with one thread, which is useful on a busy machine too, and elapsed time otherwise.

    python benchmarks/cpu_parts.py --threads 1
    python benchmarks/cpu_parts.py --shape small --only head softmax
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from gpu_loss import pointwise_loss_and_gradient_inplace
from torch import Tensor, nn

from tinyllama import hardware
from tinyllama.model import attention, flops, loss
from tinyllama.train.muon import newton_schulz
from tinyllama.train.setup import clip_grad_norm

SQUARE = 2048
NEWTON_SCHULZ = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
Variants = dict[str, tuple[Callable[[], object], float]]
"""Function and FLOPs of each variant, by name; no FLOPs if its rate is not of interest."""


class Shape(NamedTuple):
    """A model, and the tokens of a micro-batch."""

    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    layers: int
    vocab_size: int
    sequences: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the outputs and inputs of a block's matrices."""
        head_dim = self.dim // self.heads
        return {
            "gate_up": (2 * self.ffn_dim, self.dim),
            "down": (self.dim, self.ffn_dim),
            "qkv": ((self.heads + 2 * self.kv_heads) * head_dim, self.dim),
            "out": (self.dim, self.dim),
        }


SHAPES = {"small": Shape(512, 1408, 8, 2, 8, 32_000, 8, 512), "demo": Shape(256, 704, 4, 2, 6, 4096, 16, 256)}


def products(shape: Shape) -> Iterator[tuple[str, Variants]]:
    """Yield the products of a block's linear layers: forward, gradient of the input, gradient of the weight."""
    for name, (outputs, inputs) in shape.matrices().items():
        x, weight, gradient = (
            bf16(*size) for size in ((shape.tokens, inputs), (outputs, inputs), (shape.tokens, outputs))
        )
        count = 2.0 * shape.tokens * outputs * inputs
        yield (
            name,
            {
                "forward": (partial(torch.mm, x, weight.T), count),
                "input": (partial(torch.mm, gradient, weight), count),
                "weight": (partial(torch.mm, gradient.T, x), count),
            },
        )


def head(shape: Shape) -> Iterator[tuple[str, Variants]]:
    """Yield the head's three products for chunks of different sizes."""
    weight = bf16(shape.vocab_size, shape.dim)
    for tokens in (512, 1024, 2048, 4096):
        hidden, logits = bf16(tokens, shape.dim), bf16(tokens, shape.vocab_size)
        count = 2.0 * tokens * shape.dim * shape.vocab_size
        yield (
            f"head, {tokens} tokens",
            {
                "logits": (partial(torch.mm, hidden, weight.T), count),
                "hidden": (partial(torch.mm, logits, weight), count),
                "weight": (partial(torch.mm, logits.T, hidden), count),
            },
        )


def softmax(shape: Shape) -> Iterator[tuple[str, Variants]]:
    """Yield variants of the loss and its gradient for about 2^23 logits, in parts of different sizes."""
    tokens = 2**23 // shape.vocab_size // 256 * 256
    logits = bf16(tokens, shape.vocab_size)
    targets = torch.randint(shape.vocab_size, (tokens,))
    compiled = torch.compile(pointwise_loss_and_gradient_inplace, dynamic=False)

    def in_parts(function: Callable[[Tensor, Tensor, float], Tensor], exponent: int) -> None:
        size = max(1, 2**exponent // shape.vocab_size)
        for part, part_targets in zip(logits.clone().split(size), targets.split(size), strict=True):
            function(part, part_targets, 0.0)

    ours = loss._loss_and_gradient_inplace
    variants: Variants = {f"2^{size} logits": (partial(in_parts, ours, size), 0) for size in (18, 19, 20, 21)}
    variants["max with indices"] = (partial(in_parts, loss_with_indices_inplace, 20), 0)
    variants["compiled"] = (lambda: compiled(logits.clone(), targets, 0.0), 0)
    yield f"softmax, {tokens} tokens", variants


def loss_with_indices_inplace(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Do what `loss._loss_and_gradient_inplace` does on a GPU, without `z_loss`."""
    targets = targets[:, None]
    target_logits = logits.gather(-1, targets).float()
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    highest, token = logits.max(-1, keepdim=True)
    log_z = highest.float() - probabilities.gather(-1, token).log()
    probabilities.scatter_add_(-1, targets, probabilities.new_full(targets.shape, -1.0))
    logits.copy_(probabilities)
    return (log_z - target_logits).squeeze(1)


def attend(shape: Shape) -> Iterator[tuple[str, Variants]]:
    """Yield a layer's attention, forward and backward, for blocks of different sizes."""
    width, time_steps = shape.dim // shape.heads, shape.sequence_length
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    inputs = [bf16(shape.sequences, count, time_steps, width).requires_grad_() for count in heads]

    def run(block: int) -> None:
        attention.ATTENTION_BLOCK = flops.ATTENTION_BLOCK = block
        attention._causal_mask.cache_clear()
        output = attention.causal_attention(*inputs)
        torch.autograd.grad(output, inputs, output.detach())

    yield "attention", {f"blocks of {block}": (partial(run, block), 0) for block in (64, 128, 256)}


def update(shape: Shape) -> Iterator[tuple[str, Variants]]:
    """Yield an optimizer step of all blocks and the head: clipping, AdamW, Muon."""
    sizes = [*shape.matrices().values()] * shape.layers + [(shape.vocab_size, shape.dim)]
    model = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)
    for parameter in model:
        parameter.grad = torch.randn(parameter.shape) * 1e-6
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    variants: Variants = {
        "clipping, norm below 1": (partial(clip_grad_norm, model, 1.0), 0),
        "clipping, torch's": (partial(nn.utils.clip_grad_norm_, list(model), 1.0), 0),
        "AdamW": (adamw.step, 0),
    }
    for name, (rows, columns) in shape.matrices().items():
        short, long = sorted((rows, columns))
        count = shape.layers * NEWTON_SCHULZ["ns_steps"] * 2.0 * (2 * short**2 * long + short**3)
        variants[f"Muon, {name}"] = (partial(newton_schulz, bf16(shape.layers, rows, columns), NEWTON_SCHULZ), count)
    yield "optimizer step", variants


PARTS = {part.__name__: part for part in (products, head, softmax, attend, update)}


def bf16(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16)


def measure(variants: Variants, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each variant; the first round is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, (function, _) in variants.items():
            begun = clock()
            function()
            seconds[name].append(clock() - begun)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Print a table of each shape and part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=hardware.available_cpu_count())
    parser.add_argument("--rounds", type=int, default=7, help="measurements per variant (default: %(default)s)")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    hardware.tune_malloc()
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    square = bf16(SQUARE, SQUARE)
    peak = 2 * SQUARE**3 / measure({"": (lambda: square @ square, 0)}, arguments.rounds, clock)[""]
    print(
        f"{hardware.device_name(torch.device('cpu'))}, {arguments.threads} threads; product: {peak / 1e9:.0f} GFLOP/s"
    )
    for name in arguments.shape:
        for title, variants in (table for part in arguments.only for table in PARTS[part](SHAPES[name])):
            for variant, seconds in measure(variants, arguments.rounds, clock).items():
                rate = f"  {variants[variant][1] / seconds / peak:4.0%} of the product" if variants[variant][1] else ""
                print(f"{name}  {title:20} {variant:22} {1e3 * seconds:8.1f} ms{rate}", flush=True)


if __name__ == "__main__":
    main()
