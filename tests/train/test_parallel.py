"""However many processes train, and however they share the model, they learn the same from the same rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.train.ranked import launch, losses, rows_read, train_several, write_recipe

STEPS = 50
HYBRID = {"parallel.replicate": 2}
PRECISIONS = {"fp32": 1e-5, "bf16": 1e-3}


@pytest.fixture(scope="module")
def runs(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of 50 steps: 1, 2, 4 ranks and 2 groups of 2, in both precisions, and one compiled."""
    folder = tmp_path_factory.mktemp("parallel")
    layouts: dict[int, dict[str, dict[str, object]]] = {
        1: {"1": {}},
        2: {"2": {}},
        4: {"4": {}, "2x2": HYBRID},
    }
    for ranks, named in layouts.items():
        recipes = [
            write_recipe(
                folder,
                small,
                f"{name}-{precision}",
                **{"train.tokens": STEPS * 8 * 64, "train.batch_sequences": 8, "train.precision": precision, **fields},
            )
            for name, fields in named.items()
            for precision in PRECISIONS
        ]
        train_several(folder, ranks, recipes)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("layout", "ranks"), [("2", 2), ("4", 4), ("2x2", 4)])
def test_any_number_of_ranks_reads_the_same_rows_to_the_same_loss(
    runs: Path, layout: str, ranks: int, precision: str
) -> None:
    name = f"{layout}-{precision}"
    assert (rows_read(runs, name, ranks) == rows_read(runs, f"1-{precision}", 1)).all()
    found, alone = losses(runs, name), losses(runs, f"1-{precision}")
    assert len(found) == STEPS
    print(max(abs(a/b-1) for a,b in zip(found,alone)))
    assert found == pytest.approx(alone, rel=PRECISIONS[precision])
    assert found[-1] < found[0] - 1
