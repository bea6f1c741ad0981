"""Every format of a release in its own engine, held against what the checkpoint said before it was exported.

Reads a release, writes nothing. An engine runs in a process of its own: what it does with a damaged file, be it an
error or an abort, is a row that failed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.errors import InputError
from tinyllama.files import sha256_of
from tinyllama.formatting import format_table
from tinyllama.loading import HuggingFaceLlama
from tinyllama.progress import Bar
from tinyllama.release.formats import LIBRARIES, Format, formats_of, require_libraries
from tinyllama.release.isolation import crash_line, observe
from tinyllama.release.lineage import read_facts

Facts = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    subject: str
    """The format, or the file."""
    what: str
    expected: str
    found: str
    passed: bool
    remedy: str = ""
    """Where the engine ended by a signal: what to do. Such a check says nothing about the file."""


@dataclass(frozen=True)
class Tolerance:
    """How far a format may be from the reference."""

    nats: float
    """Difference of the mean nats a token, as a share of the reference's."""
    tie: float | None
    """Logits: where the reference chose a token by less, no token is compared from there on. None: no token at all, for
    in 4 and 8 bits another may be the likeliest."""


# Measured on SmolLM2-135M, whose 2T tokens for 135M weights make it as sensitive as any: nats are off by 0.0001 % in
# float32, 0.005 % in F16 (whose products are of float16; by up to 0.008 % for random weights), 0.4 % in Q8_0, 2.4 % in
# Q4_K_M, 0.3 % in int8. Larger models lose less. Logits of random models are off by 0.007 in F16 where they have a
# standard deviation of 1, by 0.06 where it is 2.7; only two of them, of one token, make a tie.
LIMITS = {
    "huggingface": Tolerance(nats=1e-4, tie=1e-3),
    "gguf F16": Tolerance(nats=1e-3, tie=0.02),
    "gguf Q8_0": Tolerance(nats=0.01, tie=None),
    "gguf Q4_K_M": Tolerance(nats=0.05, tie=None),
    "ctranslate2 float32": Tolerance(nats=1e-4, tie=1e-3),
    "ctranslate2 int8": Tolerance(nats=0.01, tie=None),
}


def verify(release_folder: str | Path) -> list[Check]:
    """Check a release's files, and each of its formats in transformers, llama.cpp or CTranslate2.

    Raises InputError where the folder is no release, has no reference, or one of the engines is not installed.
    """
    folder = Path(release_folder)
    facts = read_facts(folder)
    if not (facts.keys() >= {"reference", "files", "formats"} and facts["reference"] and facts["files"]):
        raise InputError(f"{folder}/release.json: no reference to hold the formats against; release the run again")
    found = formats_of(facts["files"])
    require_libraries(library for entry in found for library in LIBRARIES[entry.name.split()[0]])
    there = {entry.name.split()[0] for entry in found}
    lacking = [name for name in facts["formats"] if name not in there]
    source = _source(facts)
    with Bar("verifying", 1 + len(found) + bool(source), "parts", rate="") as bar:
        bar.show(0, "every file's hash")
        checks = file_checks(folder, facts["files"])
        checks += [Check(name, "format", "its files", "none in release.json", False) for name in lacking]
        for done, entry in enumerate(found, 1):
            bar.show(done, f"{entry.name} in {entry.engine}")
            checks += format_checks(entry, folder / entry.path, facts["reference"])
        if source:
            bar.show(1 + len(found), f"{source} in transformers")
            checks += source_checks(source, facts["reference"])
        bar.show(1 + len(found) + bool(source))
    return checks


def _source(facts: Facts) -> Path | None:
    """The folder that a release of external weights was made from; None where it is gone or has changed."""
    origin = facts.get("initial_weights") or {}
    if facts.get("step") is not None or "config" not in origin or not Path(origin["source"]).exists():
        return None
    try:
        there = HuggingFaceLlama.open(origin["source"])
        same = (there.digest, sha256_of(there.folder / "config.json")) == (origin["digest"], origin["config"])
    except InputError:  # no model any more
        return None
    return there.folder if same else None


def source_checks(folder: Path, reference: Facts) -> list[Check]:
    """The rows of external weights: transformers on the folder that the reference was computed from.

    The reference of such a release comes from this project's own reader, so no format of it shows a mistake in that.
    The tokenizer is not compared: transformers' LlamaTokenizer gives other ids than SentencePiece where spaces repeat.
    """
    limits, observed = LIMITS["huggingface"], observe("transformers-source", folder, reference)
    assert limits.tie is not None
    if "error" in observed:
        return [Check("source", "loads and runs", "yes", observed["error"], False, observed.get("remedy", ""))]
    rows = _greedy(reference, observed, limits.tie), _nats(reference, observed, limits.nats)
    return [Check("source", *row) for row in rows]


def file_checks(folder: Path, files: Facts) -> list[Check]:
    """A row for each file that is missing or not what it was; one for all of them where there is none."""
    bad = [check for name, entry in files.items() if (check := _file_check(folder, name, entry))]
    size = sum(entry["bytes"] for entry in files.values())
    whole = f"{len(files)} files, {size:,} bytes"
    return bad or [Check("files", "size and sha256", whole, whole, True)]


def _file_check(folder: Path, name: str, entry: Facts) -> Check | None:
    path = folder / name
    if not path.is_file():
        return Check(name, "file", f"{entry['bytes']:,} bytes", "missing", False)
    if (size := path.stat().st_size) != entry["bytes"]:
        return Check(name, "size", f"{entry['bytes']:,} bytes", f"{size:,} bytes", False)
    if (digest := sha256_of(path)) != entry["sha256"]:
        return Check(name, "sha256", entry["sha256"][:12], digest[:12], False)
    return None


def format_checks(entry: Format, path: Path, reference: Facts) -> list[Check]:
    """The rows of one format, from its own engine."""
    limits = LIMITS[entry.name]
    if limits.tie is None:
        reference = {**reference, "continuations": []}
    observed = observe(entry.engine, path, reference)
    if "error" in observed:
        return [Check(entry.name, "loads and runs", "yes", observed["error"], False, observed.get("remedy", ""))]
    rows = [_special(reference, observed), _tokens(reference, observed)]
    if limits.tie is not None:
        rows.append(_greedy(reference, observed, limits.tie))
    rows.append(_nats(reference, observed, limits.nats))
    return [Check(entry.name, *row) for row in rows]


CheckedFormat = tuple[str, str, str, bool]  # a Check's, without its subject


def _special(reference: Facts, observed: Facts) -> CheckedFormat:
    expected = {"bos": reference["bos_id"], "eos": reference["eos_id"]}
    found = observed["special"]
    return "bos, eos", _format_ids(expected), _format_ids(found), found == expected


def _format_ids(special: Facts) -> str:
    return ", ".join(f"{special[name]}" for name in ("bos", "eos"))


def _tokens(reference: Facts, observed: Facts) -> CheckedFormat:
    texts = reference["texts"]
    total = f"{len(texts)} texts, {sum(len(entry['ids']) for entry in texts)} tokens"
    for entry, ids in zip(texts, observed["texts"], strict=True):
        if ids != entry["ids"]:
            place = _first_difference(entry["ids"], ids)
            expected = f"{entry['ids'][max(0, place - 1) : place + 3]}"
            return "tokens", expected, f"{ids[max(0, place - 1) : place + 3]} in {entry['text'][:20]!r}", False
    return "tokens", total, total, True


def _greedy(reference: Facts, observed: Facts, tie: float) -> CheckedFormat:
    """Continuations token by token, each up to the first that the reference itself all but tossed a coin for."""
    total = sum(len(entry["ids"]) for entry in reference["continuations"])
    compared = ties = 0
    for number, (entry, ids) in enumerate(zip(reference["continuations"], observed["continuations"], strict=True), 1):
        place = _first_difference(entry["ids"], ids)
        if place < len(entry["ids"]) and entry["margins"][place] >= tie:
            expected, found = entry["ids"][place], ids[place] if place < len(ids) else "no more"
            return "greedy", f"{expected}", f"{found}, token {place + 1} after prompt {number}", False
        compared += place
        ties += place < len(entry["ids"])
    stops = f"; {ties} stopped at a tie (margin under {tie:g})" if ties else ""
    return "greedy", f"{total} tokens", f"{compared} the same{stops}", True


def _nats(reference: Facts, observed: Facts, share: float) -> CheckedFormat:
    expected, found = reference["scored"]["nats_per_token"], observed["nats_per_token"]
    off = found / expected - 1
    return "nats a token", f"{expected:.4f} ± {share:.2%}", f"{found:.4f} ({off:+.3%})", abs(off) <= share


def _first_difference(expected: Sequence[int], found: Sequence[int]) -> int:
    pairs = enumerate(zip(expected, found, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(expected), len(found)))


def table(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the lines of the table, a line for each engine that crashed, and the result."""
    rows = [(row.subject, row.what, row.expected, row.found, "pass" if row.passed else "FAIL") for row in checks]
    yield from format_table(("format", "check", "expected", "found", ""), rows)
    yield from dict.fromkeys(crash_line(row.found, row.remedy) for row in checks if row.remedy)
    failed = [row for row in checks if not row.passed]
    yield f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
