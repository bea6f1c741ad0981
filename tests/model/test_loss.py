"""The loss in chunks: their size on a CPU and on a GPU, and the same loss and gradients for every size."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.model import loss
from tinyllama.model.flops import GPU_LOGITS_CHUNK, LOGITS_CHUNK, loss_chunk_tokens

VOCAB, DIM, TOKENS, Z_LOSS = 97, 16, 50, 0.01


@pytest.mark.parametrize("vocab_size", [97, 8_192, 32_000, 128_256, 2**21, 2**28])
def test_chunks_on_a_gpu_are_multiples_of_128_tokens(vocab_size: int) -> None:
    tokens = loss_chunk_tokens(vocab_size, is_cpu=False)
    assert tokens % 128 == 0 or tokens == max(1, GPU_LOGITS_CHUNK // vocab_size) < 128
    assert tokens * vocab_size <= max(GPU_LOGITS_CHUNK, vocab_size) < (tokens + 128) * vocab_size
    assert loss_chunk_tokens(vocab_size, is_cpu=True) == max(1, LOGITS_CHUNK // vocab_size)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 50, 128])
def test_loss_and_gradients_are_those_of_torch_for_every_chunk_size(
    monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr(loss, "loss_chunk_tokens", lambda vocab_size, is_cpu: chunk_tokens)
    random = torch.Generator().manual_seed(1)
    hidden = (8 * torch.randn(TOKENS, DIM, generator=random)).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=random).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)
    token_nats = torch.empty(TOKENS)
    nats = loss.linear_cross_entropy(hidden, weight, targets, Z_LOSS, token_nats=token_nats)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    with_z_loss = expected + Z_LOSS * logits.logsumexp(-1).square().sum()
    found = [nats.detach(), *torch.autograd.grad(nats, (hidden, weight))]
    for one, other in zip(found, [expected.detach(), *torch.autograd.grad(with_z_loss, exact)], strict=True):
        assert relative_error(one, other) < 1e-5
    assert relative_error(token_nats, F.cross_entropy(logits, targets, reduction="none").detach()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_the_softmax_change_neither_loss_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(1)
    hidden = (8 * torch.randn(TOKENS, DIM, generator=random)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=random).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=random)

    def results(part_tokens: int) -> list[Tensor]:
        monkeypatch.setattr(loss, "CPU_SOFTMAX_CHUNK", part_tokens * VOCAB)
        nats = loss.linear_cross_entropy(hidden, weight, targets, Z_LOSS)
        return [nats, *torch.autograd.grad(nats, (hidden, weight))]

    expected = results(TOKENS)
    for part_tokens in (1, 7):
        for found, reference in zip(results(part_tokens), expected, strict=True):
            torch.testing.assert_close(found, reference, rtol=0, atol=0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_head_gradient_of_many_equal_targets_does_not_overflow_in_fp16() -> None:
    tokens, dim, vocab_size = 40_000, 4, 8
    hidden = torch.full((tokens, dim), 4.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(vocab_size, dim, requires_grad=True)
    loss.linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64)).backward()
    assert weight.grad is not None
    assert weight.grad[0].tolist() == pytest.approx([tokens * 4.0 * (1 / vocab_size - 1)] * dim, rel=1e-3)
