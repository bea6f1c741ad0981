"""However many processes train, and however they share the model, they learn the same from the same rows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.train.torchrun import metric_by_step, run_torchrun, sequences_read, train_recipes, write_recipe
from torch import Tensor

from tinyllama.model.llama import Llama, initialize
from tinyllama.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for all runs

STEPS = 50
BATCH = 8
FP32: dict[str, object] = {"train.precision": "fp32"}
BF16: dict[str, object] = {"train.precision": "bf16"}
RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "1-fp32": (1, FP32),
    "1-bf16": (1, BF16),
    "2-fp32": (2, FP32),
    "2-bf16": (2, BF16),
    "2-bf16-compiled": (2, BF16 | {"train.compile": True}),
    "4-fp32": (4, FP32),
    "4-bf16": (4, BF16),
    "2x2-fp32": (4, FP32 | {"parallel.replicate": 2}),
}


@pytest.fixture(scope="module")
def runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `RUNS`, of 50 steps each."""
    folder = tmp_path_factory.mktemp("parallel")
    fields: dict[str, object] = {"train.tokens": STEPS * BATCH * 64, "train.batch_sequences": BATCH}
    seldom: dict[str, object] = {"checkpoint.every_steps": STEPS, "train.validate_every_steps": STEPS}
    fields |= seldom | {"train.micro_batch_sequences": BATCH, "train.validation_sequences": BATCH}
    for count in (1, 2, 4):
        mine = {name: own for name, (ranks, own) in RUNS.items() if ranks == count}
        train_recipes(folder, count, [write_recipe(folder, small, name, **fields | own) for name, own in mine.items()])
    return folder


@pytest.mark.parametrize(
    ("name", "alone", "tolerance"),
    [
        ("2-fp32", "1-fp32", 1e-5),
        ("4-fp32", "1-fp32", 1e-5),
        ("2x2-fp32", "1-fp32", 1e-5),
        ("2-bf16", "1-bf16", 1e-3),
        ("4-bf16", "1-bf16", 1e-3),
    ],
)
def test_any_number_of_ranks_reads_the_same_rows_to_the_same_loss(
    runs: Path, name: str, alone: str, tolerance: float
) -> None:
    rows = sequences_read(runs, alone, 1)
    assert rows.shape == (STEPS, BATCH, 65)
    assert (sequences_read(runs, name, RUNS[name][0]) == rows).all()
    found = metric_by_step(runs, name)
    assert len(found) == STEPS
    assert found == pytest.approx(metric_by_step(runs, alone), rel=tolerance)
    assert found[-1] < found[0] - 1
    # AdamW all but hides a gradient that is too large or too small: the norm before clipping tells.
    norms = metric_by_step(runs, name, "gradient_norm")
    assert norms == pytest.approx(metric_by_step(runs, alone, "gradient_norm"), rel=20 * tolerance)


def test_compiled_on_two_ranks_it_follows_the_uncompiled_one(runs: Path) -> None:
    found, uncompiled = metric_by_step(runs, "2-bf16-compiled"), metric_by_step(runs, "2-bf16")
    assert found == pytest.approx(uncompiled, rel=5e-3)
    assert found != uncompiled  # it was compiled: another rounding


def test_shards_that_do_not_make_up_the_ranks_are_refused_in_one_line(small: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small, "unfit")
    done = run_torchrun(tmp_path, 2, "-m", "tinyllama", "train", recipe, "--parallel.shard", "3")
    (line,) = re.findall(r"tinyllama: .*", done.stderr)
    assert line == (
        "tinyllama: parallel: shard 3 x replicate 1 do not make 2 ranks; change one of them or the number of ranks"
    )
    assert set(re.findall(r"exitcode *: *(\d+) \(pid", done.stderr)) == {"2"}, done.stderr
    assert not (tmp_path / "runs/unfit/metrics.jsonl").exists()


# Each rank's part of the weights, of processes that torch's own stand-in tells that they are one of several.
SHARDS = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from tinyllama.model.llama import initialize
from tinyllama.recipe import Recipe
from tinyllama.train.distributed import World
from tinyllama.train.setup import build_model

def write(recipe, rank, count):
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    model = build_model(recipe, 601, World(rank, count, torch.device("cpu")))
    initialize(model, recipe.seed)
    parts = {name: parameter.to_local() for name, parameter in model.named_parameters()}
    torch.save(parts, f"{count}-{recipe.parallel.replicate}-{rank}.pt")

torch.set_num_threads(1)
for count, replicate in json.loads(sys.argv[2]):
    for rank in range(count):
        if not (child := os.fork()):  # which spares it the imports
            write(Recipe.load(sys.argv[1], {"parallel.replicate": replicate}), rank, count)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def shards(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    layouts = "[[3, 1], [4, 1], [6, 2]]"
    command = [sys.executable, "-c", SHARDS, str(small / "recipe.yaml"), layouts]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder


def expected(whole: Tensor, shard: int, rank: int) -> Tensor:
    """A rank's part as FSDP cuts it: rows, the first ranks' part the larger."""
    parts = whole.chunk(shard)
    return parts[rank % shard] if rank % shard < len(parts) else whole[:0]


@pytest.mark.parametrize(("count", "replicate"), [(3, 1), (4, 1), (6, 2)])
def test_every_rank_begins_with_its_part_of_the_same_weights(
    small: Path, shards: Path, count: int, replicate: int
) -> None:
    recipe = Recipe.load(small / "recipe.yaml")
    whole = Llama(recipe.model, 601)
    initialize(whole, recipe.seed)
    for rank in range(count):
        parts = torch.load(shards / f"{count}-{replicate}-{rank}.pt")
        assert parts.keys() == dict(whole.named_parameters()).keys()
        for name, parameter in whole.named_parameters():
            assert torch.equal(parts[name], expected(parameter.detach(), count // replicate, rank)), (rank, name)


# Parameters here and in all, and the bytes by which the peak rose while they were made and filled.
FULL_SIZE = """
from pathlib import Path
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from tinyllama.model.llama import initialize
from tinyllama.recipe import Recipe
from tinyllama.train.distributed import World
from tinyllama.train.setup import build_model

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024

dist.init_process_group("fake", rank=5, world_size=16, store=FakeStore())
before = peak()
recipe = Recipe.load("tinyllama-1.1b", {"train.compile": False})  # whose import takes 200 MB
model = build_model(recipe, 32_000, World(5, 16, torch.device("cpu")))
initialize(model, recipe.seed)
local = sum(parameter.to_local().numel() for parameter in model.parameters())
print(local, sum(parameter.numel() for parameter in model.parameters()), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no record of peak memory")
def test_at_full_size_a_rank_never_holds_more_than_its_share_and_one_matrix(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_SIZE], check=False, capture_output=True, text=True, cwd=tmp_path, timeout=200
    )
    assert done.returncode == 0, done.stderr
    here, all_ranks, rose = map(int, done.stdout.split())
    assert all_ranks == 1_100_048_384
    assert here == all_ranks // 16
    assert rose < 4 * (here + 32_000 * 2048) + 150_000_000  # the largest matrix, and a little for everything else
