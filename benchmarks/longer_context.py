"""A longer context for the demo's model: bits per byte by position, compared with the demo's model on equal targets.

    python benchmarks/longer_context.py [--seeds 1337 1 2] [--one-base] [--folder DIR] [--name trial --train.tokens 99k]

For each seed, the script trains the demo's recipe and releases the model, whose context has 256 tokens. The recipe
demo-long then extends the context to 1,024 tokens. With --one-base, all seeds extend the model of the first seed. Other
flags are fields of demo-long, for trials. Interrupted runs resume.

The targets are those of all validation documents of the demo with more than 256 tokens, of at most their first 4,096
tokens. A document is divided into rows of 1,024 tokens from its beginning on. The extended model reads a row at once.
The demo's model reads a row in windows of 256 tokens, or in a sliding window, in which each target beyond 256 has 193
to 256 tokens of context. The standard error of a difference treats the documents as independent.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ablation import make_data, tinyllama
from torch import Tensor

from tinyllama.data.store import TokenStore
from tinyllama.loading import load_model
from tinyllama.model.llama import PRECISIONS, Llama
from tinyllama.recipe import Recipe
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.validation import position_ranges, target_bytes

SHORT, LONG, STRIDE, BATCH, MAX_ROWS = 256, 1024, 64, 16, 4
"""Context of the demo, extended context, step of the sliding window, rows of a forward pass, and of a document."""
PRECISION = PRECISIONS[Recipe.load("demo").train.precision]
PARTS = {
    **{f"{part.start}-{part.stop - 1}": part for part in position_ranges(LONG)},
    f"{SHORT}-{LONG - 1}": range(SHORT, LONG),
}
"""Ranges of positions in a table."""
READERS = ("windows", "sliding window", "unchanged", "extended")
"""Ways to read a row. `unchanged` is the demo's model on a row at once, beyond its context."""


@dataclass(frozen=True)
class Rows:
    """The rows of the documents: N rows, and D documents."""

    ids: Tensor
    """Inputs and, shifted by one, targets: int64 [N, LONG + 1]; padded at the end."""
    lengths: Tensor
    """Number of targets: [N]."""
    documents: Tensor
    """Number of each row's document: [N]."""
    num_bytes: Mapping[str, Tensor]
    """Size of the targets' text by document, for each range of positions: [D]."""


def main() -> None:
    """Extend a model for each seed, print the tables, and print the mean difference at each range of positions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="default: %(default)s")
    parser.add_argument("--one-base", action="store_true", help="train the demo only with the first seed")
    parser.add_argument("--name", default="long", help="beginning of the names of the extended runs")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tinyllama-benchmarks/demo")
    chosen, fields = parser.parse_known_args()
    make_data(chosen.folder)
    rows = read_rows(chosen.folder)
    print(f"{len(rows.ids):,} rows of {int(rows.documents.max()) + 1} documents, {rows.lengths.sum():,} targets")
    ratios = []
    for seed in chosen.seeds:
        base = train_base(chosen.folder, chosen.seeds[0] if chosen.one_base else seed)
        extended = extend(chosen.folder, base, f"{chosen.name}-{seed}", seed, fields)
        nats = read_base(chosen.folder, base, rows) | {"extended": nats_of(load_model(extended, PRECISION), rows.ids)}
        print(f"\n{base.parts[-4]}, extended by {extended.name}\n" + "\n".join(table(rows, nats)), flush=True)
        ratios.append(
            {
                part: by_document(rows, nats["extended"], part).sum() / by_document(rows, nats["windows"], part).sum()
                for part in PARTS
            }
        )
    print()
    for part in PARTS:
        changes = [100 * (float(found[part]) - 1) for found in ratios]
        print(f"{part}: {statistics.mean(changes):+.2f} % (seeds: {', '.join(f'{change:+.2f}' for change in changes)})")


def train_base(folder: Path, seed: int) -> Path:
    """Train the demo with a seed and release it; return the release's Hugging Face folder."""
    run = folder / f"runs/base-{seed}"
    release = run / f"releases/step-{Recipe.load('demo').train.steps:08d}"
    if not (release / "release.json").is_file():
        tinyllama(folder, "train", "demo", "--name", run.name, "--seed", str(seed), "--train.sample_prompts", "[]")
        tinyllama(folder, "release", f"runs/{run.name}", "--formats", "huggingface")
    return release / "huggingface"


def extend(folder: Path, base: Path, name: str, seed: int, fields: Sequence[str]) -> Path:
    """Extend the context of a model with the recipe demo-long and changed fields; return the run's folder."""
    flags = ["--name", name, "--seed", str(seed), "--train.initial_weights", str(base.relative_to(folder)), *fields]
    tinyllama(folder, "prepare", "demo-long", *flags)
    tinyllama(folder, "train", "demo-long", *flags)
    return folder / "runs" / name


def read_rows(folder: Path) -> Rows:
    """Return the rows of all validation documents of the demo with more than SHORT tokens."""
    store, tokenizer = TokenStore.open(folder / "runs/demo/store"), Tokenizer.load(folder / "runs/demo/tokenizer")
    ids, lengths, documents, num_bytes = [], [], [], {part: list[int]() for part in PARTS}
    splits = [split for name, split in store.splits.items() if name.endswith("/validation")]
    found = [
        split.read(one.start, one.start + one.tokens)
        for split in splits
        for one in split.find_documents(range(len(split)))
    ]
    for number, document in enumerate(tokens for tokens in found if len(tokens) > SHORT):
        tokens = torch.from_numpy(document.astype("int64"))
        own = [tokens[start : start + LONG + 1] for start in range(0, len(tokens) - 1, LONG)][:MAX_ROWS]
        ids += own
        lengths += [len(row) - 1 for row in own]
        documents += [number] * len(own)
        for name, part in PARTS.items():
            num_bytes[name].append(
                sum(len(target_bytes(row[None, part.start : part.stop + 1], tokenizer)) for row in own)
            )
    padded = torch.nn.utils.rnn.pad_sequence([*ids, torch.zeros(LONG + 1, dtype=torch.int64)], batch_first=True)[:-1]
    sizes = {part: torch.tensor(own) for part, own in num_bytes.items()}
    return Rows(padded, torch.tensor(lengths), torch.tensor(documents), sizes)


@torch.no_grad()
def nats_of(model: Llama, ids: Tensor) -> Tensor:
    """Return the loss of each target of sequences, int64 [B, T + 1], in nats: float64 [B, T]."""
    parts = []
    for part in ids.split(BATCH * LONG // (ids.shape[1] - 1)):
        nats = torch.empty(part[:, 1:].numel())
        model.loss(part[:, :-1], part[:, 1:], token_nats=nats)
        parts.append(nats.double().view(len(part), -1))
    return torch.cat(parts)


def read_base(folder: Path, base: Path, rows: Rows) -> dict[str, Tensor]:
    """Return the losses of the demo's model on the same targets, for each way of reading: [N, LONG]."""
    path, model = folder / f"{base.parts[-4]}.pt", load_model(base, PRECISION)
    if path.is_file():
        return dict(torch.load(path))
    windows = torch.stack([rows.ids[:, start : start + SHORT + 1] for start in range(0, LONG, SHORT)], 1)
    sliding = [rows.ids[:, end - SHORT : end + 1] for end in range(SHORT + STRIDE, LONG + 1, STRIDE)]
    found = nats_of(model, windows.flatten(0, 1)).view(len(rows.ids), LONG)
    last = nats_of(model, torch.stack(sliding, 1).flatten(0, 1))[:, -STRIDE:].reshape(len(rows.ids), LONG - SHORT)
    nats = {
        "windows": found,
        "sliding window": torch.cat([found[:, :SHORT], last], 1),
        "unchanged": nats_of(model, rows.ids),
    }
    torch.save(nats, path)
    return nats


def by_document(rows: Rows, nats: Tensor, part: str) -> Tensor:
    """Return the bits of each document's targets in a range of positions: [D]."""
    positions = torch.arange(LONG)
    own = PARTS[part]
    is_wanted = (positions >= own.start) & (positions < own.stop) & (positions < rows.lengths[:, None])
    bits = torch.where(is_wanted, nats, 0).sum(1) / math.log(2)
    return torch.zeros(len(rows.num_bytes[part]), dtype=torch.float64).index_add(0, rows.documents, bits)


def table(rows: Rows, nats: Mapping[str, Tensor]) -> list[str]:
    """Return a table of bits per byte, and the differences of the extended model with their standard errors."""
    lines = [f"| positions | {' | '.join(READERS)} | less than windows | less than the sliding window |"]
    lines.append("|---" * (len(READERS) + 3) + "|")
    for part in PARTS:
        bits = {reader: by_document(rows, nats[reader], part) for reader in READERS}
        total = rows.num_bytes[part].sum()
        cells = [f"{bits[reader].sum() / total:.4f}" for reader in READERS]
        cells += [difference(bits[reader] - bits["extended"], rows.num_bytes[part]) for reader in READERS[:2]]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def difference(bits: Tensor, num_bytes: Tensor) -> str:
    """Format a difference in bits per byte with its standard error over documents: bits [D], num_bytes [D]."""
    ratio, count = bits.sum() / num_bytes.sum(), len(bits)
    error = ((bits - ratio * num_bytes).square().sum() * count / (count - 1)).sqrt() / num_bytes.sum()
    return f"{ratio:+.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
