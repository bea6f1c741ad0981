"""A test that brings a library into the tests' process that may crash it."""


def test_that_imports_an_engine() -> None:
    import ctranslate2

    assert ctranslate2.__version__


def test_that_runs_next() -> None:
    pass
