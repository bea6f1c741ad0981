"""Tests that are still to run in another process when one crashes."""

import time

import pytest


@pytest.mark.parametrize("number", range(3))
def test_that_takes_long(number: int) -> None:
    time.sleep(200)
