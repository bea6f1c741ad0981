"""Every stage has an answer to every fault, which a test shows or a reason explains; docs/faults.md says the same."""

from itertools import product
from pathlib import Path

from tests.conftest import names_of_tests
from tests.faults.page import FAULTS, PAGE, STAGES, matrix, page


def test_every_cell_is_decided_once_and_no_other_is_there() -> None:
    cells = matrix()
    assert set(cells) == set(product(STAGES, FAULTS))
    for place, cell in cells.items():
        assert set(cell) in ({"promise", "tests"}, {"empty"}), place
        assert all(cell.values()), place
        assert all(str(word).strip() for word in cell.values()), place


def test_every_test_that_a_cell_names_is_collected() -> None:
    named = {test for cell in matrix().values() for test in cell.get("tests", [])}
    for test in sorted(named):
        file, _, function = test.partition("::")
        assert file.startswith("tests/")
        assert Path(file).name.startswith("test_"), test
        assert function in names_of_tests(file), test


def test_the_page_is_that_of_the_matrix() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.faults.page`"
