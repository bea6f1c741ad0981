"""A document mask: documents in one sequence have the values and gradients of documents alone, exactly separated."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from tests.model.test_attention import output_and_gradients, random_inputs
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama.model import attention, document_mask
from tinyllama.model.attention import document_attention
from tinyllama.model.document_mask import block_attention, block_mask
from tinyllama.model.llama import Llama, initialize
from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.recipe import ActivationCheckpointing, Model

VOCAB = 97
CONFIG = Model(dim=64, layers=3, heads=8, kv_heads=2, ffn_dim=160, context_length=700)
Attend = Callable[..., Tensor]
CASES = {  # length of the sequences, and the beginnings of documents after the first token
    "one token": (1, [[], []]),
    "undivided": (200, [[], [], []]),
    "short documents": (64, [[1, 2, 3, 40], [63], []]),
    "blocks saved": (300, [[5, 6, 128, 129, 299], [], [150]]),
    "blocks recomputed": (640, [[100], [7, 256, 500, 513], [1]]),
}
every_case = pytest.mark.parametrize(("time", "beginnings"), CASES.values(), ids=CASES.keys())


def starts_of(time: int, beginnings: Sequence[Sequence[int]]) -> Tensor:
    """Return the document starts int32[B, T] of sequences in which documents begin at some tokens."""
    starts = torch.zeros(len(beginnings), time, dtype=torch.int32)
    for row, own in zip(starts, beginnings, strict=True):
        for beginning in own:
            row[beginning:] = beginning
    return starts


def visible(starts: Tensor) -> Tensor:
    """Return a mask bool[B, 1, T, T] of the keys that each query may use."""
    time = torch.arange(starts.shape[1])
    return ((time <= time[:, None]) & (time >= starts[:, :, None]))[:, None]


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible(starts), enable_gqa=True)


def gpu_attention(query: Tensor, keys: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """Run the GPU's attention on the CPU, with torch's reference implementation of flex_attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # refuses gradients
        patch.setattr(document_mask, "_compiled", lambda function, _: function)
        return block_attention(query, keys, values, block_mask(starts))


OURS: dict[str, Attend] = {"CPU": document_attention, "GPU": gpu_attention}
ours = pytest.mark.parametrize("attend", OURS.values(), ids=OURS.keys())


@ours
@every_case
def test_values_and_gradients_equal_torch_with_a_mask(attend: Attend, time: int, beginnings: list[list[int]]) -> None:
    starts = starts_of(time, beginnings)
    inputs = random_inputs(len(starts), 6, 2, time, torch.float32)
    found = output_and_gradients(lambda *inputs: attend(*inputs, starts), inputs)
    expected = output_and_gradients(partial(masked_attention, starts=starts), inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 2e-5


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_no_bit_depends_on_another_document(
    attend: Attend, time: int, beginnings: list[list[int]], dtype: torch.dtype
) -> None:
    """Changing one document of a sequence changes the values and the gradients of that document only."""
    starts = starts_of(time, beginnings)
    inputs = random_inputs(len(starts), 4, 2, time, dtype)
    before = output_and_gradients(lambda *inputs: attend(*inputs, starts), inputs)
    changed_documents = starts == starts[:, time // 2 : time // 2 + 1]
    noise = torch.randn(time, generator=torch.Generator().manual_seed(5)).to(dtype)
    where = (changed_documents * noise)[:, None, :, None]
    after = output_and_gradients(
        lambda *inputs: attend(*inputs, starts), [(each.detach() + 10 * where).requires_grad_() for each in inputs]
    )
    for one, other in zip(before, after, strict=True):
        differs = (one != other).any(-1).any(1)
        assert not differs[~changed_documents].any()
        assert time == 1 or differs[changed_documents].float().mean() > 0.9


@pytest.mark.parametrize(("time", "beginnings"), [(256, [[]]), (600, [[7, 130]])])  # all saved, and all recomputed
def test_operator_passes_opcheck(time: int, beginnings: list[list[int]]) -> None:
    inputs = random_inputs(1, 4, 2, time, torch.float32)
    torch.library.opcheck(attention._forward, (*inputs, starts_of(time, beginnings)))


def build(mode: ActivationCheckpointing = "none", precision: torch.dtype = torch.float32) -> Llama:
    model = Llama(CONFIG, VOCAB, precision)
    initialize(model, seed=7)
    model.set_activation_checkpointing(mode)
    return model


def token_ids(*size: int, seed: int = 3) -> Tensor:
    return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(seed))


def logits_and_embedding_gradients(model: Llama, ids: Tensor, targets: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of the loss with respect to each input's embedding."""
    embedded: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    with model.embedding.register_forward_hook(keep):
        model.loss(ids, targets, document_starts=starts).backward()
    (embedding,) = embedded
    assert embedding.grad is not None
    with torch.no_grad():
        return model(ids, document_starts=starts), embedding.grad


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_changing_a_document_changes_no_logit_and_no_gradient_of_another(precision: torch.dtype) -> None:
    """Neither earlier nor later documents of the sequence change; the targets are those of the changed document too."""
    row, other = token_ids(1, 401), token_ids(1, 401, seed=4)
    starts = starts_of(400, [[90, 260]])
    model = build(precision=precision)
    logits, gradients = logits_and_embedding_gradients(model, row[:, :-1], row[:, 1:], starts)
    for first, last in ((0, 90), (90, 260), (260, 401)):
        changed = row.clone()
        changed[:, first:last] = other[:, first:last]
        others = torch.ones(400, dtype=torch.bool)
        others[max(0, first - 1) : last] = False  # the token before the document predicts its first token
        found = logits_and_embedding_gradients(model, changed[:, :-1], changed[:, 1:], starts)
        assert torch.equal(found[0][:, others], logits[:, others])
        document = starts[0] == (starts[0, first - 1] if first else -1)  # its last target has changed
        kept = others & ~document
        assert torch.equal(found[1][:, kept], gradients[:, kept])
        assert not torch.equal(found[0], logits)


def test_a_sequence_equals_its_documents_alone() -> None:
    """Positions start at 0 for a document alone, but not in the sequence: RoPE depends only on distances."""
    ids, edges = token_ids(1, 640), [0, 3, 200, 513, 640]
    model = build()
    found, gradients = logits_and_embedding_gradients(model, ids, ids, starts_of(640, [edges[1:-1]]))
    for start, end in pairwise(edges):
        alone = ids[:, start:end]
        expected = logits_and_embedding_gradients(model, alone, alone, starts_of(end - start, [[]]))
        torch.testing.assert_close(found[:, start:end], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(gradients[:, start:end], expected[1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_equal_transformers_with_a_mask_and_positions_that_restart() -> None:
    model, ids, starts = build(), token_ids(2, 300), starts_of(300, [[17, 250], [128]])
    peer = LlamaForCausalLM(LlamaConfig(**config_to_hugging_face(CONFIG, VOCAB, 1, 2) | {"dtype": "float32"}))
    peer.load_state_dict(dict(to_hugging_face(model.state_dict(), CONFIG)))
    expected = peer(ids, attention_mask=visible(starts), position_ids=torch.arange(300) - starts).logits
    torch.testing.assert_close(model(ids, document_starts=starts), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_with_the_attention_of_a_gpu_equal_those_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, mode: ActivationCheckpointing
) -> None:
    """All boundaries and blocks share one graph, as on a GPU; the graph runs torch's reference implementation."""
    expected = [*losses_and_gradients(build())]
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(document_mask, "_compiled", lambda function, _: function)
    monkeypatch.setattr(document_mask, "_has_flex_attention", lambda _: True)
    torch._dynamo.reset()
    counters.clear()
    model = build(mode)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, backend="aot_eager")
    for found, other in zip(losses_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


BOUNDARIES = [starts_of(64, rows) for rows in ([[5, 40], []], [[], [63]], [list(range(1, 64)), [32]])]


def losses_and_gradients(model: Llama) -> Iterator[Tensor]:
    """Yield the loss and the gradients for each of BOUNDARIES."""
    row = token_ids(2, 65)
    for starts in BOUNDARIES:
        model.zero_grad()
        loss = model.loss(row[:, :-1], row[:, 1:], document_starts=starts)
        loss.backward()
        yield from (loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(mode: ActivationCheckpointing) -> None:
    found, expected = [*losses_and_gradients(build(mode))], [*losses_and_gradients(build())]
    assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_all_boundaries_and_blocks_share_one_compiled_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = build()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    for found, expected in zip(losses_and_gradients(model), losses_and_gradients(build()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
