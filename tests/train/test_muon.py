"""Muon updates sharded matrices as torch.optim.Muon updates full matrices, with two collectives per batch."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import muon_program
from tests.train.torchrun import run_torchrun
from torch import nn

from tinyllama.train.muon import Muon, choose_owners, newton_schulz

SIZES = {"2": 2, "3": 3, "4": 4, "2x2": 4}
"""Number of ranks of each mesh of `muon_program`."""


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of `muon_program` on four ranks."""
    folder = tmp_path_factory.mktemp("comparisons")
    done = run_torchrun(folder, 4, muon_program.__file__)
    assert done.returncode == 0, done.stderr
    return folder


def results(folder: Path, mesh: str, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{mesh}-{case}-{rank}.json").read_text()) for rank in range(SIZES[mesh])]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("mesh", SIZES)
@pytest.mark.parametrize("case", muon_program.CASES)
def test_sharded_matrices_change_as_with_torch_muon(comparisons: Path, mesh: str, case: str) -> None:
    for found in results(comparisons, mesh, case):
        assert found["cosine"] > 0.9999
        assert found["largest difference"] < 0.05  # relative to the largest change, for bf16 sums in any order


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SIZES)
def test_every_matrix_moves_to_one_rank_and_back(comparisons: Path, mesh: str) -> None:
    shards = 2 if mesh == "2x2" else SIZES[mesh]
    for case, (shapes, _) in muon_program.CASES.items():
        found = results(comparisons, mesh, case)
        parts = sum(len(muon_program.PARTS.get(case, {}).get(shape, [0])) for shape in shapes)
        assert sum(result["orthogonalized"] for result in found) == parts * SIZES[mesh] // shards
        assert all(result["orthogonalized"] for result in found) or len(shapes) < shards


@pytest.mark.slow
def test_collectives_do_not_increase_with_the_number_of_matrices(comparisons: Path) -> None:
    for mesh in SIZES:
        for case in ("one", "many", "stacked"):
            for found in results(comparisons, mesh, case):
                assert found["collectives"] == {"c10d.alltoall_base_": 2}
    for found in results(comparisons, "2", "batches"):  # 2 x 700 elements per batch
        assert found["collectives"] == {"c10d.alltoall_base_": 8}


def test_work_is_balanced_among_owners() -> None:
    shapes = [(11264, 2048)] * 22 + [(2048, 5632)] * 22 + [(2560, 2048)] * 22 + [(2048, 2048)] * 22
    for ranks in (2, 8, 64):
        owners = choose_owners(shapes, ranks)
        flops = [0] * ranks
        for owner, (rows, columns) in zip(owners, shapes, strict=True):
            short, long = sorted((rows, columns))
            flops[owner] += 4 * short**2 * long + 2 * short**3  # X X^T, its square, and the product with X
        largest = 4 * 2048**2 * 11264 + 2 * 2048**3
        assert max(flops) <= max(1.1 * sum(flops) / ranks, largest)


@pytest.mark.parametrize("ns_steps", [5, 3])
def test_unsharded_matrices_and_state_dicts_are_those_of_torch_muon(ns_steps: int) -> None:
    torch.manual_seed(1)
    start = [torch.randn(*shape) for shape in ((24, 16), (16, 40), (24, 16), (5, 16))]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    hyperparameters: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_steps": ns_steps}
    muon, reference = (
        Muon(ours, **hyperparameters),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **hyperparameters),
    )
    for step in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(*one.shape)
            other.grad = one.grad.clone()
        muon.step()
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0.02 * 0.01 * math.sqrt(max(one.shape)))
        states = muon.state_dict(), reference.state_dict()
        assert states[0]["param_groups"] == states[1]["param_groups"]
        torch.testing.assert_close(states[0]["state"], states[1]["state"])
        if step == 1:  # continue each from the other's state
            muon.load_state_dict(states[1])
            reference.load_state_dict(states[0])


def test_parts_of_stacked_matrices_change_as_separate_matrices_of_torch_muon() -> None:
    torch.manual_seed(1)
    rows = ([24, 8, 8], [12], [40, 40], [8, 20])  # of 16 columns; the parts of the last matrix have unequal scales
    start = [torch.randn(sum(own), 16) for own in rows]
    ours = [nn.Parameter(matrix.clone()) for matrix in start]
    theirs = [nn.Parameter(part) for part in muon_program.split(start, rows)]
    hyperparameters: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    muon = Muon(ours, **hyperparameters, parts=dict(zip(ours, rows, strict=True)))
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **hyperparameters)
    for _ in range(3):
        gradients = [torch.randn_like(matrix) for matrix in ours]
        for matrix, gradient in zip(ours, gradients, strict=True):
            matrix.grad = gradient
        for part, gradient in zip(theirs, muon_program.split(gradients, rows), strict=True):
            part.grad = gradient
        muon.step()
        reference.step()
    before = muon_program.split(start, rows)
    for found, expected, first in zip(muon_program.split(ours, rows), theirs, before, strict=True):
        assert (found - expected).norm() < 0.01 * (expected - first).norm()


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 1e-3, 5e-2), (torch.float32, 0, 1e-5)])
def test_products_have_the_precision_of_the_dtype(dtype: torch.dtype, low: float, high: float) -> None:
    torch.manual_seed(1)
    weight, gradient = nn.Parameter(torch.zeros(24, 16)), torch.randn(24, 16)
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, dtype=dtype)
    weight.grad = gradient
    optimizer.step()
    exact = newton_schulz(gradient[None].double(), optimizer.param_groups[0])[0]
    assert low <= (weight + 0.2 * math.sqrt(24) * exact).norm() / weight.norm() < high


def test_normalized_rows_are_those_of_torchs_update_scaled_to_equal_norms() -> None:
    torch.manual_seed(1)
    shapes = [(24, 16), (16, 40), (24, 16)]
    gradients = [torch.randn(*shape) * torch.rand(shape[0], 1) for shape in shapes]
    weights = [[nn.Parameter(torch.zeros(*shape)) for shape in shapes] for _ in range(2)]
    for own in weights:
        for weight, gradient in zip(own, gradients, strict=True):
            weight.grad = gradient.clone()
    hyperparameters: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.9}
    Muon(weights[0], **hyperparameters, normalizes_rows=True).step()
    torch.optim.Muon(weights[1], adjust_lr_fn="match_rms_adamw", **hyperparameters).step()
    for found, update in zip(*weights, strict=True):
        norms = update.norm(dim=1, keepdim=True)
        assert norms.max() > 1.05 * norms.min()
        expected = update / norms * norms.square().mean().sqrt()
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("normalizes_rows", [False, True])
def test_matrix_without_gradient_and_zero_gradient(normalizes_rows: bool) -> None:
    still, zero = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    zero.grad = torch.zeros(4, 3)
    Muon([still, zero], lr=0.1, weight_decay=0.5, momentum=0.9, normalizes_rows=normalizes_rows).step()
    assert torch.equal(still, torch.ones(4, 3))
    assert torch.equal(zero, torch.full((4, 3), 0.95))
