"""Muon for matrices whose rows FSDP2 shards among ranks, and for the matrices of a single process.

torch.optim.Muon computes 15 products per matrix, and the products of a sharded matrix need collectives. Here, each
matrix moves to one owner rank and back, with two collectives per batch of matrices. The owner orthogonalizes matrices
of equal shape together. Matrices move in the dtype of the products: bfloat16 as in torch.optim.Muon, or float32.

The parts of a stacked matrix, such as query, key and value, are orthogonalized separately.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from tinyllama.model.flops import MUON_BATCH_ELEMENTS


class Muon(torch.optim.Muon):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, for tensors or for DTensors that are sharded by rows.

    Hyperparameters and state are those of torch.optim.Muon, and the updates are equal up to rounding. All DTensors have
    the same mesh, [shard] or [replicate, shard]. Each replica orthogonalizes all matrices. `parts` has the numbers of
    rows of the matrices that a parameter stacks; they get the updates that they would get as separate parameters.
    With `normalizes_rows`, the rows of an update have equal norms, and the update keeps its norm (NorMuon, Li et al.
    2025, arXiv:2510.05491, but without a running mean of the rows' norms). `dtype` is that of the products: bfloat16,
    or float32 for CPUs and GPUs without bf16 instructions, where bfloat16 is many times slower.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float,
        ns_steps: int = 5,
        normalizes_rows: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        parts: Mapping[nn.Parameter, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        super().__init__(matrices, lr, weight_decay, momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
        self.normalizes_rows, self.dtype, self.parts = normalizes_rows, dtype, parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient; these must be the same on all ranks."""
        for settings in self.param_groups:
            matrices = [matrix for matrix in settings["params"] if matrix.grad is not None]
            group = _shard_group(matrices[0]) if matrices else None
            orthogonalize = partial(_orthogonalize, settings=settings, normalizes_rows=self.normalizes_rows)
            for batch in _batches(matrices, MUON_BATCH_ELEMENTS * (group.size() if group else 1)):
                directions = [self._direction(matrix, settings["momentum"]) for matrix in batch]
                part_rows = [self.parts.get(matrix, [len(matrix)]) for matrix in batch]
                if group:
                    shapes = [matrix.shape for matrix in batch]
                    directions = _orthogonalize_shards(directions, shapes, part_rows, orthogonalize, group)
                else:
                    orthogonalize(directions, part_rows)
                rate, decay = settings["lr"], settings["lr"] * settings["weight_decay"]
                for matrix, direction in zip(batch, directions, strict=True):
                    _local(matrix).mul_(1 - decay).add_(direction, alpha=-rate)

    def _direction(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Update a matrix's momentum; return its gradient with Nesterov momentum, in `dtype`, this rank's rows."""
        assert matrix.grad is not None
        state, gradient = self.state[matrix], _local(matrix.grad)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        buffer = _local(state["momentum_buffer"]).lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum).to(self.dtype)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_group(matrix: Tensor) -> dist.ProcessGroup | None:
    """Return the group of the ranks that together hold a DTensor, or None for a tensor."""
    if not isinstance(matrix, DTensor):
        return None
    assert matrix.placements[-1] == Shard(0), matrix.placements
    return matrix.device_mesh.get_group(matrix.device_mesh.ndim - 1)


def _cost(shape: Sequence[int]) -> int:
    """Return a number proportional to the FLOPs of orthogonalizing a matrix."""
    short, long = sorted(shape)
    return short**2 * (2 * long + short)


def _batches(matrices: list[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Yield batches of at most `limit` elements or of one matrix, by decreasing cost, with equal shapes adjacent."""
    batch: list[nn.Parameter] = []
    for matrix in sorted(matrices, key=lambda matrix: (_cost(matrix.shape), matrix.shape), reverse=True):
        if batch and sum(math.prod(other.shape) for other in (*batch, matrix)) > limit:
            yield batch
            batch = []
        batch.append(matrix)
    if batch:
        yield batch


def choose_owners(shapes: Iterable[Sequence[int]], ranks: int) -> list[int]:
    """Return the owner of each matrix: the rank with the least work so far. Costs should decrease."""
    work, owners = [0] * ranks, []
    for shape in shapes:
        owners.append(work.index(min(work)))
        work[owners[-1]] += _cost(shape)
    return owners


def _orthogonalize_shards(
    shards: list[Tensor],
    shapes: list[torch.Size],
    part_rows: list[Sequence[int]],
    orthogonalize: Callable[[list[Tensor], list[Sequence[int]]], None],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Orthogonalize matrices of these shapes; `shards` and the result are this rank's rows of the matrices.

    `part_rows` has the numbers of rows of each matrix's parts.
    """
    ranks, owners = range(group.size()), choose_owners(shapes, group.size())
    by_owner = [[index for index, owner in enumerate(owners) if owner == rank] for rank in ranks]
    order = [index for indices in by_owner for index in indices]
    owned = [shapes[index] for index in by_owner[group.rank()]]
    # numbers of elements: of this rank's rows of each owner's matrices, and of each rank's rows of the owned matrices
    sent = [sum(shards[index].numel() for index in indices) for indices in by_owner]
    sizes = [[_num_rows(rows, rank, len(ranks)) * columns for rows, columns in owned] for rank in ranks]
    received = [sum(of_rank) for of_rank in sizes]

    ours = torch.cat([shards[index].flatten() for index in order])
    theirs = ours.new_empty(sum(received))
    dist.all_to_all_single(theirs, ours, received, sent, group=group)
    parts = [rows.split(of_rank) for rows, of_rank in zip(theirs.split(received), sizes, strict=True)]
    full = [torch.cat(own).view(shape) for *own, shape in zip(*parts, owned, strict=True)]
    orthogonalize(full, [part_rows[index] for index in by_owner[group.rank()]])
    for number, result in enumerate(full):
        returned_parts = result.flatten().split([of_rank[number] for of_rank in sizes])
        for part, row in zip(parts, returned_parts, strict=True):
            part[number].copy_(row)
    dist.all_to_all_single(ours, theirs, sent, received, group=group)
    returned = dict(zip(order, ours.split([shards[index].numel() for index in order]), strict=True))
    return [returned[index].view_as(shard) for index, shard in enumerate(shards)]


def _num_rows(rows: int, rank: int, ranks: int) -> int:
    """Return the number of rows of a rank's shard, as in torch.chunk: the last ranks may have fewer rows or none."""
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk))


def _orthogonalize(
    matrices: list[Tensor], part_rows: list[Sequence[int]], settings: dict[str, Any], normalizes_rows: bool
) -> None:
    """Replace the parts of matrices[R, C] by their updates; parts of equal shape share batched products.

    `part_rows` has the numbers of rows of each matrix's parts. An update has a root mean square of about 0.2, like
    AdamW's (Liu et al. 2025, arXiv:2502.16982).
    """
    parts = [part for matrix, rows in zip(matrices, part_rows, strict=True) for part in matrix.split(rows)]
    for shape, group in groupby(sorted(parts, key=lambda part: part.shape), key=lambda part: part.shape):
        equal = list(group)
        results = newton_schulz(torch.stack(equal), settings)
        if normalizes_rows:
            norms = results.norm(dim=2, keepdim=True).clamp(min=settings["eps"])
            results = results / norms * norms.square().mean(1, keepdim=True).sqrt()
        for part, result in zip(equal, results, strict=True):
            part.copy_(result).mul_(0.2 * math.sqrt(max(shape)))


def newton_schulz(matrices: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return matrices with the singular vectors of `matrices`, floating[N, R, C], and singular values near 1.

    Each matrix X is divided by its Frobenius norm. Then each step replaces X by a X + b (X X^T) X + c (X X^T)^2 X
    (Jordan et al. 2024). `settings` has the coefficients, the number of steps, and the smallest divisor.
    """
    a, b, c = settings["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=settings["eps"])
    for _ in range(settings["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
