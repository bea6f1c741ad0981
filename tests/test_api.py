"""The public names of the package."""

import inspect

import pytest

import tinyllama


@pytest.mark.parametrize("name", tinyllama.__all__)
def test_public_name_exists_with_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(tinyllama, name))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tinyllama.no_such_name
