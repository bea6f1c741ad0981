"""The `data` part of a recipe: sources, cleaning, mixes, markers, and where and how the token store is made."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tinyllama.recipe.fields import Address, Count, RecipeModel, Share, SourceName, parse_tokens
from tinyllama.recipe.messages import suggest

Weight = Annotated[float, Field(ge=0)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda names: (names,) if isinstance(names, str) else names)]
# YAML's plain and single-quoted text, and a shell, leave escapes as they are.
Separator = Annotated[
    str, Field(min_length=1), AfterValidator(lambda text: text.replace("\\n", "\n").replace("\\t", "\t"))
]
TokenCount = Annotated[int, BeforeValidator(parse_tokens), Field(ge=0)]

SLIMPAJAMA_SUBSETS = (
    "RedPajamaCommonCrawl",
    "RedPajamaC4",
    "RedPajamaGithub",
    "RedPajamaBook",
    "RedPajamaArXiv",
    "RedPajamaWikipedia",
    "RedPajamaStackExchange",
)


class Cleaning(RecipeModel):
    """What is taken out of a source, by datatrove's blocks, in this order; nothing by default."""

    deduplicate: Literal["exact", "minhash"] | None = None
    """Keep the first of equal or, by minhash, near-equal documents (of 5 words up) of all sources that ask for it."""
    filters: tuple[Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"], ...] = ()
    """Quality filters, in this order, with their papers' thresholds; c4 also drops lines of the documents it keeps."""
    decontaminate: Names = ()
    """Evaluation tasks; a document that shares a run of `decontamination_words` words with one of their items goes."""
    decontamination_words: Count = 13
    """Length of such a run in words (13: Brown et al. 2020, appendix C)."""
    language: str = "en"
    """Whose rules cut text into words, as an ISO 639-1 code."""


class Source(RecipeModel):
    """One data set and its share of the mix."""

    format: Literal["slimpajama", "starcoderdata", "jsonl", "parquet", "text", "csv", "huggingface"]
    """How its files are read; `huggingface` is a data set's folder, as downloaded or as saved by `datasets`."""
    path: Address = Field(min_length=1)
    """Folder, file, glob or fsspec URL (`s3://…`), read in sorted order; a folder is read with everything below it but
    names that begin with a dot."""
    weight: Weight
    """Share of every batch, relative to the other sources' weights."""
    text: str | None = None
    """Field or column that holds a document; `text` without it, and `content` in Starcoderdata."""
    separator: Separator | None = None
    """Separator between the documents of a file of format text: `"\\n\\n"` (blank lines), `"\\n"` (a document per
    line), `"<|endoftext|>"` and the like; without it a file is one document."""
    holdout: Literal["tail"] | None = None
    """What `data.validation_fraction` is a fraction of: the documents; with `tail`, each text (its end)."""
    max_compression_ratio: Count = 1000
    """Bytes that a packed or parquet file may hold for each of its own; at a file with more, `prepare` stops."""
    include: Names = ()
    """Subsets that are read (SlimPajama's `redpajama_set_name`, Starcoderdata's languages); none named means all."""
    exclude: Names = ()
    """Subsets that are left out."""
    clean: Cleaning = Cleaning()
    """What is taken out of it."""

    @model_validator(mode="after")
    def _subsets_are_known(self) -> Self:
        if self.format == "text" and self.text is not None:
            raise ValueError(f"format text has no field {self.text!r}, a file is a document; take text out")
        if self.separator and self.format != "text":
            raise ValueError(f"format {self.format} has documents of its own, without a separator; take separator out")
        named = (*self.include, *self.exclude)
        if named and self.format not in ("slimpajama", "starcoderdata"):
            raise ValueError(f"format {self.format} has no subsets to include or exclude; take {named[0]} out")
        for both in set(self.include) & set(self.exclude):
            raise ValueError(f"{both} is included and excluded; take it out of one")
        for name in named if self.format == "slimpajama" else ():
            if name not in SLIMPAJAMA_SUBSETS:
                raise ValueError(f"{name} is no subset of SlimPajama; {suggest(name, SLIMPAJAMA_SUBSETS, cutoff=0.4)}")
        return self


class SpecialTokens(RecipeModel):
    """What stands around each document in the token store."""

    bos: bool = True
    """Put `<s>` before each document."""
    eos: bool = True
    """Put `</s>` after each document."""


class MixtureStage(RecipeModel):
    """A mix that holds from a token count on."""

    from_tokens: TokenCount
    """Tokens seen when the mix begins; it takes effect at the next step boundary."""
    weights: dict[str, Weight]
    """Share of each source; a source that is not named has none."""
    ramp_tokens: TokenCount = 0
    """Tokens over which the mix moves from the one before to this one, in up to 64 equal steps."""


SlurmOption = Literal[
    "account", "comment", "constraint", "exclude", "exclusive", "gres", "licenses", "mail-type", "mail-user", "nice",
    "nodelist", "prefer", "priority", "qos", "reservation", "tmp", "wckey",
]  # fmt: skip
"""Options of sbatch that a recipe may give. A line of a batch script holds several, so their values have no spaces."""


class Slurm(RecipeModel):
    """What the jobs ask of a Slurm cluster."""

    partition: Annotated[str, Field(pattern=r"^[\w.,-]+$")]
    """Where they run."""
    time: Annotated[str, Field(pattern=r"^[\d:-]+$")] = "24:00:00"
    """Longest time of one task."""
    memory_gigabytes: Count = 4
    """Memory of one task; a worker needs less than one."""
    arguments: dict[SlurmOption, Annotated[str, Field(pattern=r"^\S*$")]] = Field(default={})
    """Other options of sbatch, without their dashes; options that run something or write files are not among them."""


class Data(RecipeModel):
    """Where the text comes from and where its tokens go."""

    store: str
    """Folder of the token store: `prepare` writes it, `train` reads it."""
    workers: Count | Literal["auto"] = "auto"
    """Tasks under way at a time; never changes the bytes. `auto`: one a core, or all that the cluster gives."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """What runs the tasks of `prepare`: processes here, Slurm jobs, or a Ray cluster; never changes the bytes."""
    slurm: Slurm | None = None
    """What the jobs ask for, where `executor` is slurm."""
    sources: dict[SourceName, Source] = Field(min_length=1)
    """The data sets, by name: letters, digits, `_` and `-`; each has a folder of that name in the store."""
    stages: tuple[MixtureStage, ...] = ()
    """Mixes that replace the sources' weights from a token count on, in rising order."""
    document: SpecialTokens = SpecialTokens()
    """Markers around each document."""
    validation_fraction: Share = 0.0005
    """Fraction of the documents kept for validation where a source has no such split; by content hash."""

    @model_validator(mode="after")
    def _check_mixture_schedule(self) -> Self:
        starts = [stage.from_tokens for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages begin at {starts}; put them in rising order")
        for stage, following in pairwise(self.stages):
            if stage.from_tokens + stage.ramp_tokens > following.from_tokens:
                raise ValueError(
                    f"the stage from {following.from_tokens} tokens begins before the one from {stage.from_tokens} "
                    f"has ramped up, over {stage.ramp_tokens}; begin it later or shorten ramp_tokens"
                )
        for stage in self.stages:
            for name in stage.weights.keys() - self.sources.keys():
                raise ValueError(f"stages name a source {name!r} that sources lacks; correct it")
            if not sum(stage.weights.values()):
                raise ValueError(f"the stage from {stage.from_tokens} tokens: its weights sum to nothing; raise one")
        for name, source in self.sources.items():
            if source.holdout == "tail" and not self.validation_fraction:
                raise ValueError(
                    f"sources.{name}.holdout is tail, but validation_fraction is 0; give the fraction that is held out"
                )
        if not sum(source.weight for source in self.sources.values()):
            raise ValueError("the sources' weights sum to nothing; raise one")
        return self

    @model_validator(mode="after")
    def _check_executor(self) -> Self:
        if self.executor == "slurm" and self.slurm is None:
            raise ValueError("executor slurm needs data.slurm, with its partition; add it")
        return self
