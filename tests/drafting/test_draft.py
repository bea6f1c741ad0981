"""The recipe that `init` writes needs no edit: its tokenizer can be trained, and training has no warnings."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import python_sources
from tests.prepare.raw import lines, write

from tinyllama.drafting.draft import Draft, default_file, draft_recipe
from tinyllama.drafting.machine import Machine, largest_micro_batch
from tinyllama.drafting.show import init
from tinyllama.drafting.sizes import (
    MAX_EPOCHS,
    SHAPES,
    choose_sizes,
    predicted_loss,
    validation_fraction_for,
    vocabulary_candidates,
    vocabulary_for,
)
from tinyllama.errors import InputError
from tinyllama.hardware import HardwareSpec
from tinyllama.model.flops import flops_per_token, num_parameters
from tinyllama.preflight import check_training
from tinyllama.prepare.pipeline import build_store
from tinyllama.prepare.selection import train_recipe_tokenizer
from tinyllama.recipe import Optimizer, Recipe

PROSE = "The committee met on Tuesday, and most of its members agreed with the report. "


def machine(flops: float = 100e9, memory_bytes: float = 16e9, formats: tuple[str, ...] = ("huggingface",)) -> Machine:
    """Return a machine without a GPU that trains every model at half of its peak speed."""
    spec = HardwareSpec("cpu", flops, flops, memory_bytes, 1e9, 1e9, "test", is_cpu=True)
    return Machine(
        spec,
        "bf16",
        formats,
        (),
        (),
        lambda recipe, vocab_size: flops / 2 / flops_per_token(recipe.model, vocab_size, recipe.train.sequence_length),
    )


def draft(path: str) -> Draft:
    return draft_recipe([path], 10, machine, default_file(path))


def one_text(folder: Path) -> None:
    write(folder / "book.txt", "\n".join(python_sources(2)).encode()[:30_000])


def many_small_files(folder: Path) -> None:
    paragraphs = "\n\n".join(python_sources(12)).split("\n\n")[::4]
    for number, text in enumerate(paragraphs):
        write(folder / f"{number % 7}/{number}.org", text.encode())


def few_different_words(folder: Path) -> None:
    line = "12:34:56 INFO server: request 4711 took 12 ms\n"
    write(folder / "server.log", line.encode() * 40_000)


def many_characters(folder: Path) -> None:
    characters = [chr(number) for number in range(0x4E00, 0x4E00 + 1200)]
    texts = ["".join(random.Random(number).choices(characters, k=900)) for number in range(60)]
    write(folder / "a.jsonl", lines(*[{"content": text} for text in texts]))


def code_and_prose(folder: Path) -> None:
    for number, text in enumerate(python_sources(30)):
        write(folder / f"src/{number}.py", text.encode())
    write(folder / "README.md", PROSE.encode() * 400)


@pytest.mark.parametrize(
    ("fill", "minutes"),
    [(one_text, 1), (many_small_files, 1), (few_different_words, 1), (many_characters, 1), (code_and_prose, 0.02)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_drafted_recipe_passes_the_checks_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[Path], None], minutes: float
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path("mine"))
    init(["mine"], minutes, None, False, machine)
    recipe = Recipe.load("mine.yaml", {"data.workers": 1})
    train_recipe_tokenizer(recipe)
    store = build_store(recipe)
    assert store is not None
    assert check_training(recipe) == []
    for name in recipe.data.sources:
        assert store.num_validation_sequences(name, recipe.train.sequence_length)


def test_recipe_explains_its_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code_and_prose(Path("my notes"))
    write(Path("my notes/logo.png"), b"\x89PNG\0")
    assert init(["my notes"], 10, None, False, lambda: machine(formats=("huggingface", "gguf"))) == Path(
        "my-notes.yaml"
    )
    text, output = Path("my-notes.yaml").read_text(), capsys.readouterr().out
    recipe = Recipe.load("my-notes.yaml")
    assert recipe.name == "my-notes"
    assert recipe.release.formats == ("huggingface", "gguf")
    weights = [source.weight for source in recipe.data.sources.values()]
    assert sum(weights) == pytest.approx(1, abs=0.01)
    for field in ("vocab_size: ", "tokens: ", "validation_fraction: ", "model:", "batch_sequences: "):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(field)]
        assert "  # " in line
    assert "binary, or not UTF-8: 1 .png" in output
    assert output.endswith("recipe: my-notes.yaml\n")
    with pytest.raises(InputError, match=r"my-notes.yaml: exists; .*--force"):
        init(["my notes"], 10, None, False, machine)
    init(["my notes"], 20, None, True, machine)
    assert Recipe.load("my-notes.yaml").train.tokens >= recipe.train.tokens


def test_name_is_not_that_of_a_run_or_of_a_bundled_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "notes"):
        one_text(Path(name))
    Path("runs/notes").mkdir(parents=True)
    assert draft("demo").recipe.name == "demo-2"
    assert draft("notes").recipe.name == "notes-2"
    assert draft("notes/book.txt").recipe.name == "book"
    one_text(Path("2024"))
    assert draft("2024").recipe.data.sources.keys() == {"2024"}
    one_text(Path("a\nb"))
    with pytest.raises(InputError, match="control character"):
        draft("a\nb")
    assert draft_recipe(["2024", "a\nb"], 10, machine, Path("mine.yaml")).recipe.name == "mine"
    monkeypatch.chdir("2024")
    assert [default_file(path) for path in (".", "..")] == [Path("2024.yaml"), Path(f"{tmp_path.name}.yaml")]


def test_second_draft_of_a_folder_replaces_the_file_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_text(Path("notes"))
    Path("runs/notes").mkdir(parents=True)
    assert init(["notes"], 10, None, False, machine) == Path("notes.yaml")
    assert init(["notes"], 10, None, True, machine) == Path("notes.yaml")
    assert Recipe.load("notes.yaml").name == "notes-2"


def test_outputs_of_a_run_are_no_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code_and_prose(Path())
    write(Path("notes/a.md"), PROSE.encode() * 400)
    write(Path("settings.yaml"), b"key: value  # for a program\n" * 99)
    many_characters(Path())
    path = init(["."], 1, Path("mine.yaml"), False, machine)
    overrides = {"data.workers": 1}
    train_recipe_tokenizer(Recipe.load(path, overrides))
    assert build_store(Recipe.load(path, overrides)) is not None
    write(Path("runs/mine/metrics.jsonl"), lines({"content": PROSE}))
    write(Path("runs/mine/README.md"), PROSE.encode())
    path.write_text(path.read_text().replace("tokens:", "tokens:  "))
    assert build_store(Recipe.load(path, overrides)) is not None  # raises if an input was added or changed
    assert init(["."], 1, Path("mine.yaml"), True, machine) == path


def test_model_fits_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    book = write(Path("book.txt"), f"{PROSE * 500}\n\n".encode() * 80)
    os.truncate(book, 10_000_000_000)  # a sparse file, because only the beginning is read
    dims = []
    for memory_bytes in (16e9, 2e9):
        small = machine(flops=1e15, memory_bytes=memory_bytes)
        recipe = draft_recipe(["book.txt"], 10_000, lambda: small, Path("mine.yaml")).recipe  # noqa: B023 - called at once
        assert recipe.vocab_size is not None
        assert largest_micro_batch(recipe, recipe.vocab_size, small.hardware) > 0
        dims.append(recipe.model.dim)
    assert dims[0] > dims[1]
    with pytest.raises(InputError, match="memory"):
        draft_recipe(["book.txt"], 10, lambda: machine(memory_bytes=0.01e9), Path("mine.yaml"))


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_optimizer_has_the_demos_settings_at_the_rates_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.chdir(tmp_path)
    one_text(Path("mine"))
    recipe = draft_recipe(["mine"], 1, lambda: replace(machine(), precision=precision), Path("mine.yaml")).recipe
    found, demo = recipe.train, Recipe.load("demo").train
    assert found.precision == precision
    if precision == "fp16":  # in which a GPU without bf16 computes, where Muon is refused
        assert found.optimizer == Optimizer(learning_rate=found.optimizer.learning_rate)
        return
    scale = found.optimizer.learning_rate / demo.optimizer.learning_rate
    assert demo.optimizer.embedding_learning_rate
    assert found.optimizer.embedding_learning_rate == pytest.approx(scale * demo.optimizer.embedding_learning_rate)
    others = {"learning_rate", "embedding_learning_rate"}
    assert found.optimizer.model_dump(exclude=others) == demo.optimizer.model_dump(exclude=others)
    assert found.schedule.decay_fraction == demo.schedule.decay_fraction


def test_micro_batch_fits_into_memory() -> None:
    recipe = Recipe.load("demo", {"train.batch_sequences": 32, "train.micro_batch_sequences": 32})
    sizes = [
        largest_micro_batch(recipe, 4096, machine(memory_bytes=memory).hardware) for memory in (16e9, 1.3e9, 0.1e9)
    ]
    assert sizes[0] == 32 > sizes[1] > sizes[2] == 0


def test_every_shape_of_the_ladder_is_larger_than_the_one_before() -> None:
    sizes = [num_parameters(one.model, 8192) for one in SHAPES]
    assert sizes == sorted(sizes)
    rates = [one.learning_rate for one in SHAPES]
    assert rates == sorted(rates, reverse=True)
    models = [one.model for one in SHAPES]
    for name in ("demo", "tinyllama-120m", "tinyllama-1.1b"):
        assert Recipe.load(name).model in models


@given(st.floats(1e9, 1e24), st.sampled_from(vocabulary_candidates(512)), st.floats(500, 1e12), st.floats(1, 1e6))
def test_sizes_are_within_their_limits(flops: float, vocab_size: int, tokens: float, validation: float) -> None:
    sizes = choose_sizes(flops, vocab_size, tokens, validation)
    model = sizes.shape.model
    batch = sizes.batch_sequences * model.context_length
    assert sizes.tokens <= max(MAX_EPOCHS * tokens, batch)
    assert sizes.tokens * flops_per_token(model, vocab_size, model.context_length) <= max(
        1.001 * flops, batch * flops_per_token(model, vocab_size, model.context_length)
    )
    assert model.context_length <= max(64, validation)
    assert sizes.steps >= 1
    more = choose_sizes(10 * flops, vocab_size, 10 * tokens, validation)
    assert more.tokens >= sizes.tokens
    assert num_parameters(more.shape.model, vocab_size) >= num_parameters(model, vocab_size)


@pytest.mark.parametrize(("flops", "dim"), [(1e12, 64), (4e13, 128), (1e15, 192), (1e19, 1024), (6e21, 2048)])
def test_model_grows_with_the_computation(flops: float, dim: int) -> None:
    sizes = choose_sizes(flops, 4096, 1e12)
    assert sizes.shape.model.dim == dim
    parameters = num_parameters(sizes.shape.model, 4096)
    assert predicted_loss(parameters, sizes.tokens) < predicted_loss(parameters, sizes.tokens / 2)


def test_vocabulary_and_validation_follow_the_amount_of_text() -> None:
    sizes = [vocabulary_for(10**power) for power in range(3, 12)]
    assert sizes == sorted(sizes)
    assert (vocabulary_for(1e6), vocabulary_for(1e8)) == (2048, 8192)
    fractions = [validation_fraction_for(10**power) for power in range(3, 12)]
    assert fractions == sorted(fractions, reverse=True)
    assert (fractions[0], fractions[-1]) == (0.1, 0.005)
    for preferred in vocabulary_candidates(512):
        assert vocabulary_candidates(preferred)[0] == preferred
        assert sorted(vocabulary_candidates(preferred)) == sorted(vocabulary_candidates(512))
