"""Program that compares Muon on FSDP2 shards with torch.optim.Muon on full matrices; torchrun starts it on 4 ranks.

For each mesh and set of matrices, every member of the mesh writes `CASE-RANK.json` with the cosine and the largest
relative difference of the weights' changes after three steps, the counts of collectives in the last step, and the
number of matrices that the rank orthogonalized in it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tinyllama.train import muon

MESHES: dict[str, Any] = {"2": [0, 1], "3": [0, 1, 2], "4": [0, 1, 2, 3], "2x2": [[0, 1], [2, 3]]}
# Four ranks have 2, 2, 1 and 0 of 5 rows. With 3 ranks, no number of rows except 24 and 3 is divisible.
MANY = [(5, 16), *[(24, 16)] * 3, *[(16, 40)] * 3, (64, 64)]
CASES = {"one": ([(3, 8)], 2**20), "many": (MANY, 2**20), "batches": (MANY, 700), "stacked": (MANY, 2**20)}
"""Shapes of the matrices, and the number of elements per rank and batch."""
PARTS = {"stacked": {(24, 16): [12, 5, 7], (64, 64): [32, 32]}}
"""Numbers of rows of the parts of matrices, by shape."""
HYPERPARAMETERS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}


def compare(mesh: DeviceMesh, case: str) -> dict[str, object]:
    """Train three steps with both optimizers on the same gradients."""
    shapes, limit = CASES[case]
    rows = [PARTS.get(case, {}).get(shape, [shape[0]]) for shape in shapes]
    torch.manual_seed(1)
    model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    start = [weight.detach().clone() for weight in model.parameters()]
    expected = [nn.Parameter(part) for part in split(start, rows)]
    for layer in model:
        fully_shard(layer, mesh=mesh)
    parts = {weight: own for weight, own in zip(model.parameters(), rows, strict=True) if len(own) > 1}
    optimizer = muon.Muon(model.parameters(), **HYPERPARAMETERS, parts=parts)
    reference = torch.optim.Muon(expected, adjust_lr_fn="match_rms_adamw", **HYPERPARAMETERS)
    torch.manual_seed(dist.get_rank())
    with (
        mock.patch.object(muon, "MUON_BATCH_ELEMENTS", limit),
        mock.patch.object(muon, "newton_schulz", wraps=muon.newton_schulz) as newton_schulz,
    ):
        for _ in range(3):
            for layer, weight in zip(model, start, strict=True):
                layer(torch.randn(7, weight.shape[1])).square().mean().backward()
            gradients = split([full_tensor(weight.grad) for weight in model.parameters()], rows)
            for full, gradient in zip(expected, gradients, strict=True):
                full.grad = gradient
            newton_schulz.reset_mock()
            with CommDebugMode() as collectives:
                optimizer.step()
            reference.step()
            optimizer.zero_grad()
    found = flat_change(split([full_tensor(weight) for weight in model.parameters()], rows), split(start, rows))
    change = flat_change(expected, split(start, rows))
    counts = {str(name): count for name, count in collectives.get_comm_counts().items()}
    return {
        "cosine": float(torch.cosine_similarity(found, change, dim=0)),
        "largest difference": float((found - change).abs().max() / change.abs().max()),
        "collectives": counts,
        "orthogonalized": sum(len(call.args[0]) for call in newton_schulz.call_args_list),
    }


def split(matrices: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return copies of the parts of each matrix."""
    parts = (part for matrix, own in zip(matrices, rows, strict=True) for part in matrix.detach().split(list(own)))
    return [part.clone() for part in parts]


def full_tensor(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def flat_change(weights: Sequence[Tensor], start: list[Tensor]) -> Tensor:
    return torch.cat([(weight - before).detach().flatten() for weight, before in zip(weights, start, strict=True)])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, ranks in MESHES.items():
        dimensions = ("replicate", "shard") if name == "2x2" else ("shard",)
        mesh = DeviceMesh("cpu", ranks, mesh_dim_names=dimensions)  # all ranks create it, only its members use it
        if mesh.get_coordinate() is not None:
            for case in CASES:
                found = compare(mesh, case)
                Path(f"{name}-{case}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
