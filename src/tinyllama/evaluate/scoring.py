"""Log-likelihoods of continuations after their contexts, each shared beginning computed once.

A batch holds its groups' tokens one behind the other, so that the matrix products, nearly all of the work, see no
padding; only attention takes the trunks and branches apart. Only the positions that predict a continuation become
logits, 1024 at a time: 131 MB at 32,000 pieces, however long the batch.

Shapes: N tokens of a batch, G groups, M branches, T time (of a trunk or a branch), H query heads, K key/value heads, E
width of a head, D model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyllama.evaluate.prefix_batching import PrefixGroup
from tinyllama.model.attention import causal_attention
from tinyllama.model.llama import Llama, rope_table

Score = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether it is the model's greedy choice."""

_LOGITS_POSITIONS = 1024


@torch.inference_mode()
def score_batch(model: Llama, groups: Sequence[PrefixGroup]) -> dict[int, Score]:
    """The scores of a batch's requests, by their numbers."""
    batch = PackedBatch.of(groups, model.embedding.weight.device)
    hidden = _hidden(model, batch)
    positions, which = torch.unique(batch.predicting, return_inverse=True)
    likelihoods, greedy = _score_targets(model, hidden[0, positions], which, batch.targets)
    requests = [request for group in groups for request in group.requests]
    lengths = [len(request.targets) for request in requests]
    parts = zip(requests, likelihoods.split(lengths), greedy.split(lengths), strict=True)
    return {request.number: (float(part.sum()), bool(same.all())) for request, part, same in parts}


def _hidden(model: Llama, batch: "PackedBatch") -> Tensor:
    """The normed residual stream [1, N, D] of a batch's tokens."""
    length = int(batch.positions.max()) + 1
    rope = rope_table(length, model.shape.head_dim, model.shape.rope_theta, batch.ids.device)[:, batch.positions]
    x = model.embedding(batch.ids).to(model.precision)
    for block in model.blocks:
        x = block(x, rope, batch)
    out: Tensor = model.norm(x)
    return out


def _score_targets(model: Llama, hidden: Tensor, which: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How `hidden[which]` predict their targets; hidden[P, D], which and targets int64[N].

    Returns, on the CPU, log-likelihoods float64[N] and whether each target is the likeliest bool[N].
    """
    likelihoods = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(hidden), _LOGITS_POSITIONS):
        logits = model.logits(hidden[start : start + _LOGITS_POSITIONS]).float()
        mine = (which >= start) & (which < start + len(logits))
        rows, wanted = which[mine] - start, targets[mine]
        # In float64, which keeps the sum of a long continuation as exact as its parts.
        likelihoods[mine] = (logits[rows, wanted] - logits.logsumexp(-1)[rows]).double()
        greedy[mine] = logits.argmax(-1)[rows] == wanted
    return likelihoods.cpu(), greedy.cpu()


@dataclass
class PackedBatch:
    """The tokens of some groups one behind the other, and what each sees: its trunk and its branch, up to itself."""

    ids: Tensor
    """int64[1, N]."""
    positions: Tensor
    """int64[N]: places in the requests, for the rotary embedding."""
    predicting: Tensor
    """int64: tokens that predict the targets, request by request."""
    targets: Tensor
    """int64: the ids to be predicted."""
    trunks: Tensor
    """int64[G, T]: the tokens of each trunk; behind its end, any."""
    branches: Tensor
    """int64[M, T]: those of each branch."""
    keys: Tensor
    """int64[M, T of trunks + T of branches]: tokens whose keys a branch may meet."""
    mask: Tensor
    """bool[M, 1, T of branches, T of both]: those that it does meet."""
    places: Tensor
    """int64[N]: where a token stands in the flattened trunks and branches."""

    @classmethod
    def of(cls, groups: Sequence[PrefixGroup], device: torch.device) -> "PackedBatch":
        """Lay out a batch."""
        layout = _Layout()
        for group in groups:
            layout.add(group)
        return layout.batch(device)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention within trunks and branches; query[1, H, N, E], keys and values[1, K, N, E] -> [1, H, N, E]."""
        query, keys, values = (x[0].transpose(0, 1) for x in (query, keys, values))
        own = (x[self.trunks].transpose(1, 2) for x in (query, keys, values))
        mixed = [causal_attention(*own).transpose(1, 2).flatten(0, 1)]
        if len(self.branches):
            rows, met, mixture = query[self.branches], keys[self.keys], values[self.keys]
            rows, met, mixture = (x.transpose(1, 2) for x in (rows, met, mixture))
            branched = F.scaled_dot_product_attention(rows, met, mixture, attn_mask=self.mask, enable_gqa=True)
            mixed.append(branched.transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed)[self.places].transpose(0, 1)[None]


@dataclass
class _Layout:
    """A batch that is being laid out: as lists, since tensors of a few numbers are slow."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    predicting: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    trunks: list[range] = field(default_factory=list)
    branches: list[range] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    """Number of each branch's trunk."""

    def add(self, group: PrefixGroup) -> None:
        """Append a group's tokens: its trunk, then what each request adds."""
        trunk = self._append(group.requests[0].inputs[: group.trunk], 0)
        self.trunks.append(trunk)
        for request in group.requests:
            tokens = [*trunk]
            if len(request.inputs) > group.trunk:
                branch = self._append(request.inputs[group.trunk :], group.trunk)
                self.branches.append(branch)
                self.owners.append(len(self.trunks) - 1)
                tokens += branch
            self.predicting += tokens[len(tokens) - len(request.targets) :]
            self.targets += request.targets

    def _append(self, ids: list[int], position: int) -> range:
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return range(start, len(self.ids))

    def batch(self, device: torch.device) -> PackedBatch:
        """The finished batch."""
        trunks, branches = _padded(self.trunks), _padded(self.branches)
        of_trunk = torch.tensor([len(trunk) for trunk in self.trunks])[self.owners]
        time = branches.shape[1]
        whole = torch.arange(trunks.shape[1]) < of_trunk[:, None]
        own = torch.ones(time, time, dtype=torch.bool).tril()
        mask = torch.cat((whole[:, None].expand(-1, time, -1), own.expand(len(branches), -1, -1)), dim=-1)
        tensors = {
            "ids": torch.tensor([self.ids]),
            "positions": torch.tensor(self.positions),
            "predicting": torch.tensor(self.predicting),
            "targets": torch.tensor(self.targets),
            "trunks": trunks,
            "branches": branches,
            "keys": torch.cat((trunks[self.owners], branches), dim=1),
            "mask": mask[:, None],
            "places": self._places(trunks, branches),
        }
        return PackedBatch(**{name: tensor.to(device) for name, tensor in tensors.items()})

    def _places(self, trunks: Tensor, branches: Tensor) -> Tensor:
        """Where each token stands in the flattened trunks[G, T] and branches[M, T]."""
        tokens = torch.cat((trunks.flatten(), branches.flatten()))
        real = torch.cat([_is_real(rows) for rows in (self.trunks, self.branches)])
        places = torch.empty(len(self.ids), dtype=torch.long)
        places[tokens[real]] = torch.arange(len(tokens))[real]
        return places


def _padded(rows: Sequence[range]) -> Tensor:
    """int64[rows, longest]: numbers, and 0 behind the end of a row."""
    longest = max(map(len, rows), default=0)
    starts = torch.tensor([row.start for row in rows], dtype=torch.long)
    numbers = starts[:, None] + torch.arange(longest)
    return numbers.where(_is_real(rows).view(numbers.shape), 0)


def _is_real(rows: Sequence[range]) -> Tensor:
    """bool[rows x longest]: what is no padding."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    longest = max(map(len, rows), default=0)
    return (torch.arange(longest) < lengths[:, None]).flatten()
