"""The matrix of faults: a test or a reason for every stage and fault, and the docs page made from it."""

from itertools import product

from tests.faults.page import FAULTS, PAGE, STAGES, page, read_matrix


def test_every_stage_has_an_answer_to_every_fault() -> None:
    cells = read_matrix()
    assert set(cells) == set(product(STAGES, FAULTS))
    for place, cell in cells.items():
        assert set(cell) in ({"promise", "tests"}, {"empty"}), place
        assert all(cell.values()), place


def test_every_named_test_exists() -> None:
    for test in sorted({test for cell in read_matrix().values() for test in cell.get("tests", [])}):
        file, _, function = test.partition("::")
        assert f"def {function}(" in (PAGE.parents[1] / file).read_text(), test


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.faults.page`"
