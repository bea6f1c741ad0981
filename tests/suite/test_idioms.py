"""The checker of idioms."""

from tools.idioms import find_idioms


def test_idiom_is_found_with_line_across_line_break() -> None:
    text = "First.\nTraining goes\n# on from there, and it GOES ON.\n"
    assert [(line, idiom.lower()) for line, idiom, _ in find_idioms(text)] == [(2, "goes on"), (3, "goes on")]


def test_similar_words_are_no_idioms() -> None:
    assert not list(find_idioms("left_out counts; it logs on a host; the stand includes a lamp."))
