"""Any number of ranks, however they share the model, learns the same from the same sequences."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.train.torchrun import metric_by_step, run_torchrun, sequences_read, train_recipes, write_recipe
from torch import Tensor

from tinyllama.distributed import init_distributed
from tinyllama.errors import RunStoppedError
from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Recipe
from tinyllama.runs.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for all runs

STEPS = 50
BATCH = 8
FP32: dict[str, object] = {"train.precision": "fp32"}
BF16: dict[str, object] = {"train.precision": "bf16"}
MASK: dict[str, object] = {"train.document_mask": True}
RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "1-fp32": (1, FP32),
    "1-fp32-masked": (1, FP32 | MASK),
    "1-bf16": (1, BF16),
    "2-fp32": (2, FP32),
    "2-fp32-masked": (2, FP32 | MASK),
    "2-bf16": (2, BF16),
    "2-bf16-compiled": (2, BF16 | {"train.compile": True}),
    "4-fp32": (4, FP32),
    "4-bf16": (4, BF16),
    "2x2-fp32": (4, FP32 | {"parallel.replicate": 2}),
}
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of RUNS, of 50 steps each."""
    folder = tmp_path_factory.mktemp("distributed")
    fields: dict[str, object] = {
        "train.tokens": STEPS * BATCH * 64,
        "train.batch_sequences": BATCH,
        "train.micro_batch_sequences": BATCH,
        "train.validation_sequences": BATCH,
        "train.validate_every_steps": STEPS,
        "checkpoint.every_steps": STEPS,
    }
    for size in (1, 2, 4):
        own = {name: fields | changes for name, (ranks, changes) in RUNS.items() if ranks == size}
        train_recipes(folder, size, [write_recipe(folder, small, name, **values) for name, values in own.items()])
    return folder


@pytest.mark.parametrize(
    ("name", "single", "tolerance"),
    [
        ("2-fp32", "1-fp32", 1e-5),
        ("2-fp32-masked", "1-fp32-masked", 1e-5),
        ("4-fp32", "1-fp32", 1e-5),
        ("2x2-fp32", "1-fp32", 1e-5),
        ("2-bf16", "1-bf16", 1e-3),
        ("4-bf16", "1-bf16", 1e-3),
    ],
)
def test_any_number_of_ranks_reads_the_same_sequences_to_the_same_loss(
    runs: Path, name: str, single: str, tolerance: float
) -> None:
    sequences = sequences_read(runs, single, 1)
    assert sequences.shape == (STEPS, BATCH, 65)
    assert (sequences_read(runs, name, RUNS[name][0]) == sequences).all()
    losses = metric_by_step(runs, name)
    assert len(losses) == STEPS
    assert losses == pytest.approx(metric_by_step(runs, single), rel=tolerance)
    assert losses[-1] < losses[0] - 1
    columns = [
        f"validation_{metric}{source}" for metric in ("loss", "bits_per_byte") for source in ("", "/modules", "/lines")
    ]
    found, expected = ([*RunDir(runs / "runs" / run).metrics()][-1] for run in (name, single))
    assert [found[key] for key in columns] == pytest.approx([expected[key] for key in columns], rel=tolerance)
    # AdamW almost hides a wrong scale of the gradient; the norm before clipping shows it.
    norms = metric_by_step(runs, name, "gradient_norm")
    assert norms == pytest.approx(metric_by_step(runs, single, "gradient_norm"), rel=20 * tolerance)


def test_compiled_run_on_two_ranks_follows_the_uncompiled_one(runs: Path) -> None:
    compiled, uncompiled = metric_by_step(runs, "2-bf16-compiled"), metric_by_step(runs, "2-bf16")
    assert compiled == pytest.approx(uncompiled, rel=5e-3)
    assert compiled != uncompiled  # compiled code rounds differently


def test_shards_that_do_not_match_the_ranks_are_refused(small: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small, "mismatch")
    done = run_torchrun(tmp_path, 2, "-m", "tinyllama", "train", recipe, "--parallel.shard", "3")
    (line,) = re.findall(r"tinyllama: .*", done.stderr)
    assert line.startswith("tinyllama: parallel: shard 3") and "2 ranks" in line
    assert set(re.findall(r"exitcode *: *(\d+) \(pid", done.stderr)) == {"2"}, done.stderr
    assert not (tmp_path / "runs/mismatch/metrics.jsonl").exists()


def run_program(name: str, *arguments: str, folder: Path, timeout: float) -> str:
    command = [sys.executable, str(HERE / name), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each rank's shards of the initial weights."""
    folder = tmp_path_factory.mktemp("shards")
    run_program("shards_program.py", str(small / "recipe.yaml"), "[[3, 1], [4, 1], [6, 2]]", folder=folder, timeout=100)
    return folder


def expected_shard(tensor: Tensor, shard: int, rank: int) -> Tensor:
    """Return a rank's part as FSDP cuts it: by rows, larger parts first."""
    parts = tensor.chunk(shard)
    return parts[rank % shard] if rank % shard < len(parts) else tensor[:0]


@pytest.mark.parametrize(("size", "replicate"), [(3, 1), (4, 1), (6, 2)])
def test_every_rank_starts_with_its_shard_of_the_same_weights(
    small: Path, shards: Path, size: int, replicate: int
) -> None:
    recipe = Recipe.load(small / "recipe.yaml")
    model = Llama(recipe.model, 601)
    initialize(model, recipe.seed)
    for rank in range(size):
        found = torch.load(shards / f"{size}-{replicate}-{rank}.pt")
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            expected = expected_shard(parameter.detach(), size // replicate, rank)
            assert torch.equal(found[name], expected), (rank, name)


@pytest.mark.long
def test_rank_at_full_size_holds_its_shard_and_one_matrix_at_most(tmp_path: Path) -> None:
    output = run_program("full_size_program.py", folder=tmp_path, timeout=200)
    local, total, memory = map(int, output.split())
    assert total == 1_100_048_384
    assert local == total // 16
    # The largest matrix, and less than another matrix for all else, such as code that a CUDA build of torch loads.
    assert memory < 4 * (local + 32_000 * 2048) + 200_000_000


def test_missing_rank_is_named_with_address_and_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    with pytest.raises(RunStoppedError, match=r"ranks \[1\] .* 0.2 s .*MASTER_ADDR"), init_distributed(0.1):
        pass
