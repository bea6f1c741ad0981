"""Commands for text: from raw files to a token store."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from tinyllama.cli.next_command import echo_next
from tinyllama.errors import InputError
from tinyllama.formatting import echo, print_json
from tinyllama.recipe import Recipe, TokenizerKind

# Each command imports its modules when it runs, so that `tinyllama --help` does not wait for torch.
# ruff: noqa: PLC0415


def corpus(directory: Positional[Annotated[Path, arg(metavar="DIRECTORY")]]) -> None:
    """Write the embedded corpus.

    The corpus is text of the installed Python and its packages, in the formats of SlimPajama and Starcoderdata.

    Examples:
        tinyllama corpus data/corpus
        tinyllama corpus .

    Args:
        directory: Folder in which `slimpajama/` and `starcoderdata/` are created.
    """
    from tinyllama.prepare.corpus import write_corpus

    for folder, sizes in write_corpus(directory).items():
        for name, size in sizes.items():
            echo(f"{directory / folder}: {name}: {size:,} bytes")


def tokenizer_train(
    recipe: Recipe,
    vocab_size: int | None = None,
    sample_bytes: int = 16_000_000,
    force: bool = False,
    kind: TokenizerKind | None = None,
) -> None:
    """Train a BPE tokenizer on the recipe's sources.

    The tokenizer is saved in the folder that the recipe names.

    Examples:
        tinyllama tokenizer train mine.yaml
        tinyllama tokenizer train mine.yaml --vocab-size 32000 --kind bytelevel

    Args:
        vocab_size: Vocabulary size, including the special tokens and 256 byte tokens; by default the recipe's
            vocab_size, or 8192.
        kind: Kind of the tokenizer: like Llama 2's (SentencePiece), or a byte-level BPE like Llama 3's; by default the
            recipe's tokenizer_kind.
        sample_bytes: Bytes of text to train on, sampled from the sources in proportion to their weights.
        force: Replace an existing tokenizer, unless the recipe's store or run was made with it.
    """
    from tinyllama.prepare.selection import train_recipe_tokenizer

    echo(str(train_recipe_tokenizer(recipe, vocab_size, sample_bytes, force, kind)))
    echo_next(recipe.command("prepare"))


def tokenizer_import(
    source: Positional[Annotated[str, arg(metavar="SOURCE")]],
    directory: Positional[Annotated[Path, arg(metavar="DIRECTORY")]],
) -> None:
    """Convert a tokenizer.model to a tokenizer folder.

    The file is a SentencePiece model, like Llama 2's, or a tiktoken rank file, like Llama 3's. The command checks that
    the ids equal those of SentencePiece or tiktoken.

    Examples:
        tinyllama tokenizer import path/to/tokenizer.model tokenizers/llama3
        tinyllama tokenizer import OWNER/NAME tokenizers/theirs

    Args:
        source: A tokenizer.model or .tiktoken file, or a folder or hub repository that contains a tokenizer.model.
        directory: Output folder.
    """
    from tinyllama.tokenizer import Tokenizer

    Tokenizer.load(source).save(directory)
    echo(f"tokenizer: {directory}")


def prepare(recipe: Recipe, strict: bool = False) -> None:
    """Tokenize every source into the token store.

    An interrupted preparation resumes.

    Examples:
        tinyllama prepare mine.yaml
        tinyllama prepare mine.yaml --data.workers 8 --strict

    Args:
        strict: Fail with exit status 2 if a file contains no usable row, or if most of its rows are rejected.
    """
    from tinyllama.api import prepare_store
    from tinyllama.prepare.inspection import prepared_lines

    store = prepare_store(recipe, strict)
    if store is None:
        echo(f"{recipe.data.store}: submitted to Slurm; its last job finishes the store")
        return
    for line in prepared_lines(store):
        echo(line)
    echo_next(recipe.command("train"))


def inspect(
    store: Positional[Annotated[Path, arg(metavar="STORE")]],
    verify: bool = False,
    duplicates: bool = False,
    samples: int = 1,
    recipe: Annotated[str | None, arg(metavar="RECIPE")] = None,
    step: int | None = None,
    row: int | None = None,
    tokenizer: Annotated[str | None, arg(metavar="TOKENIZER")] = None,
    json: bool = False,
) -> int:
    """Show a token store: counts, mixture, dropped rows, samples.

    With --verify, check the store's files; exit status 1 if there is any damage. With --duplicates, list the documents
    that deduplication dropped. With --step, list the documents of a training sequence.

    Examples:
        tinyllama inspect data/mine --samples 5
        tinyllama inspect runs/mine --step 1000 --row 3

    Args:
        store: Folder of the store, or of a run that was trained on it, or the recipe's file.
        verify: Check every hash, and list damaged, missing and unexpected files.
        duplicates: List each document that deduplication dropped, with the document that was kept.
        samples: Number of sample documents per source.
        recipe: Recipe of the training run whose sequence is traced; for a run, the run's own recipe.
        step: Training step to trace, counted from 0.
        row: Index of the sequence in the step's batch, counted from 0; 0 by default.
        tokenizer: New location of the store's tokenizer, if the tokenizer was moved.
        json: Print the result as JSON.
    """
    from tinyllama.prepare.inspection import (
        count_duplicates,
        duplicate_lines,
        find_corruption,
        inspect_store,
        inspection_lines,
        list_duplicates,
        resolve_store,
    )

    if ((verify or duplicates) and (recipe, step, row, tokenizer) != (None,) * 4) or (verify and duplicates):
        flag = "--verify" if verify else "--duplicates"
        raise InputError(f"inspect: {flag} applies to the entire store; remove the other flags")
    folder, own_recipe = resolve_store(store)
    if duplicates:
        if json:
            listed = list(list_duplicates(folder))
            unlisted = count_duplicates(folder) - len(listed)
            print_json({"store": str(folder), "duplicates": listed, "unlisted_duplicates": unlisted})
        else:
            for line in duplicate_lines(folder):
                echo(line)
        return 0
    if verify:
        found = find_corruption(folder)
        if json:
            print_json({"store": str(folder), "problems": found})
        else:
            echo("\n".join(found) or f"{folder}: all files are present and unchanged")
        return 1 if found else 0
    result = inspect_store(folder, recipe or (own_recipe if step is not None else None), step, row, tokenizer, samples)
    if json:
        print_json(result)
    else:
        for line in inspection_lines(result):
            echo(line)
    return 0
