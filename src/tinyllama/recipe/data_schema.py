"""The `data` part of a recipe: sources, cleaning, mixture, special tokens, and how the token store is made."""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tinyllama.recipe.loading import (
    Address,
    Count,
    Fraction,
    NonNegative,
    OneOrMore,
    RecipeModel,
    Separator,
    SourceName,
    Strings,
    TokenCountOrZero,
    suggest,
)

SLIMPAJAMA_SUBSETS = (
    "RedPajamaCommonCrawl",
    "RedPajamaC4",
    "RedPajamaGithub",
    "RedPajamaBook",
    "RedPajamaArXiv",
    "RedPajamaWikipedia",
    "RedPajamaStackExchange",
)
TokenizerKind = Literal["llama2", "bytelevel"]
"""Kinds of tokenizers that `tokenizer train` trains."""
SlurmOption = Literal[
    "account", "comment", "constraint", "exclude", "exclusive", "gres", "licenses", "mail-type", "mail-user", "nice",
    "nodelist", "prefer", "priority", "qos", "reservation", "tmp", "wckey",
]  # fmt: skip
"""Options of sbatch that a recipe may set. Their values have no spaces, since all options are on one line of a batch
script."""


_PRESETS: dict[str, dict[str, Any]] = {
    "web": {
        "url_block_lists": ["fineweb"],
        "languages": ["en"],
        "filters": ["gopher_repetition", "gopher_quality", "c4", "fineweb"],
        "c4_terminal_punctuation": False,
        "deduplicate": "minhash",
        "mask_personal_data": True,
    },
}
"""Fields of each preset; `web` has the steps and settings of FineWeb (Penedo et al. 2024, arXiv:2406.17557)."""


class Cleaning(RecipeModel):
    """Cleaning steps for one source, in the order of the fields; none by default.

    `clean: web` is the preset with FineWeb's steps: `clean: {preset: web}` with other fields changes single settings.
    """

    preset: Literal["web"] | None = Field(default=None, exclude=True)
    """Name of a set of values for the other fields; a field that the recipe sets has precedence."""
    url_block_lists: Strings = ()
    """Files with one domain or URL per line, whose documents are dropped; subdomains, and pages below a URL, match
    too. `fineweb` means the lists of domains, URLs and words that FineWeb was filtered with, which datatrove has."""
    languages: Strings = ()
    """Codes of the languages to keep, as py3langid identifies them: `[en, de]`; if empty, all languages."""
    min_language_probability: Fraction = 0.65
    """Minimum probability of the identified language (0.65 in FineWeb)."""
    filters: Annotated[tuple[Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"], ...], OneOrMore] = ()
    """Quality filters, applied in this order with the thresholds of their papers; `c4` also removes lines from
    documents."""
    c4_terminal_punctuation: bool = True
    """Remove lines that do not end with a punctuation mark in the filter `c4`; FineWeb keeps these lines."""
    deduplicate: Literal["exact", "minhash"] | None = None
    """Keep only the first of equal documents (`exact`) or near-equal documents of at least 5 words (`minhash`), across
    all sources that set this field."""
    decontaminate: Strings = ()
    """Evaluation tasks. Documents that share `decontamination_words` consecutive words with an item of a task are
    dropped."""
    decontamination_words: Count = 13
    """Length of the shared word sequence in words (13 in Brown et al. 2020, appendix C)."""
    mask_personal_data: bool = False
    """Replace e-mail addresses by reserved example addresses, and public IPv4 addresses by a few fixed addresses, as in
    FineWeb."""
    language: str = "en"
    """ISO 639-1 code of the language whose rules split text into words; by default the first of `languages` or `en`."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, fields: object) -> object:
        """Replace the preset, which may be given as a string, by its fields."""
        given = {"preset": fields} if isinstance(fields, str) else fields
        if not isinstance(given, dict):
            return fields
        preset = given.get("preset")
        if isinstance(preset, str) and preset in _PRESETS:
            given = _PRESETS[preset] | {key: value for key, value in given.items() if key != "preset"}
        languages = given.get("languages")
        first = languages[:1] if isinstance(languages, list | tuple) else [languages] if languages else []
        return {"language": first[0]} | given if first else given


class Source(RecipeModel):
    """One data set and its weight in the mixture."""

    format: Literal["slimpajama", "starcoderdata", "jsonl", "parquet", "text", "csv", "huggingface"]
    """File format; `huggingface` reads a data set's folder that was downloaded from the hub or saved by `datasets`."""
    path: Address
    """Folder, file, glob or fsspec URL (`s3://…`). Files are read in sorted order. Folders are read recursively, except
    files and folders whose names begin with a dot. Files in the folder `runs` of the working directory are read only
    if the path is in it. A text source reads the files that a glob matches, whatever their endings. In a glob, `{a,b}`
    means `a` or `b`, once per folder or file name: `"docs/**/*.{md,rst}"`."""
    weight: NonNegative
    """Share of each batch, relative to the weights of the other sources."""
    text: str | None = None
    """Field or column that contains the text; by default `content` for Starcoderdata and `text` for other formats."""
    url: str | None = None
    """Field or column that contains the URL of a document, for `clean.url_block_lists`; a dot separates the name of a
    field in an object: `meta.url`. By default `url`."""
    separator: Separator | None = None
    """Separator between the documents of a text file: `"\\n\\n"` (blank lines), `"\\n"` (one document per line) or
    `"<|endoftext|>"`. Without a separator, a file is one document."""
    holdout: Literal["tail"] | None = None
    """Text to hold out for validation: a fraction of the documents (null), or the end of each document (`tail`).
    `data.validation_fraction` sets the size of this text."""
    max_compression_ratio: Count = 1000
    """Maximum number of uncompressed bytes per byte of a compressed or Parquet file; `prepare` stops at a file that
    exceeds this ratio. Up to 1 MiB of uncompressed bytes per file is always allowed."""
    include: Strings = ()
    """Subsets to read (SlimPajama's `redpajama_set_name`, Starcoderdata's languages); if empty, all subsets."""
    exclude: Strings = ()
    """Subsets to skip."""
    min_tokens: Count | None = None
    """Minimum number of tokens of a document after cleaning, including its BOS and EOS; `prepare` drops shorter
    documents. Null keeps all documents."""
    clean: Cleaning = Cleaning()
    """Cleaning of this source."""

    @model_validator(mode="after")
    def _check_format_options(self) -> Self:
        if self.format == "text" and self.text is not None:
            raise ValueError(f"format text has no field {self.text!r}; remove text")
        if self.separator and self.format != "text":
            raise ValueError(f"format {self.format} needs no separator between documents; remove separator")
        if self.format == "text" and self.clean.url_block_lists:
            raise ValueError("format text has no URLs; set clean.url_block_lists to []")
        subsets = (*self.include, *self.exclude)
        if subsets and self.format not in ("slimpajama", "starcoderdata"):
            raise ValueError(f"format {self.format} has no subsets to include or exclude; remove {subsets[0]}")
        for both in set(self.include) & set(self.exclude):
            raise ValueError(f"{both} is included and excluded; remove it from one of the two lists")
        for name in subsets if self.format == "slimpajama" else ():
            if name not in SLIMPAJAMA_SUBSETS:
                hint = suggest(name, SLIMPAJAMA_SUBSETS, cutoff=0.4)
                raise ValueError(f"{name} is not a subset of SlimPajama; {hint}")
        return self


class SpecialTokens(RecipeModel):
    """Special tokens around each document in the token store."""

    bos: bool = True
    """Put the tokenizer's BOS token, such as `<s>`, before each document."""
    eos: bool = True
    """Put the tokenizer's EOS token, such as `</s>`, after each document."""


class MixtureStage(RecipeModel):
    """A mixture that applies from a given token count."""

    from_tokens: TokenCountOrZero
    """Number of trained tokens after which the mixture applies, from the next step on."""
    weights: dict[str, NonNegative]
    """Weight of each source; 0 for sources that are not named."""
    ramp_tokens: TokenCountOrZero = 0
    """Number of tokens over which the weights change from the previous mixture to this mixture, in up to 64 equal
    steps."""


class Slurm(RecipeModel):
    """Resources for the jobs of `prepare` on a Slurm cluster."""

    partition: Annotated[str, Field(pattern=r"^[\w.,-]+$")]
    """Partition of the jobs."""
    time: Annotated[str, Field(pattern=r"^[\d:-]+$")] = "24:00:00"
    """Time limit of one task."""
    memory_gigabytes: Count = 4
    """Memory of one task; a worker needs less than one gigabyte if gigatoken supports the tokenizer."""
    arguments: dict[SlurmOption, Annotated[str, Field(pattern=r"^\S*$")]] = Field(default={})
    """Other options of sbatch, without dashes; options that run commands or write files are not allowed."""


class Data(RecipeModel):
    """Text sources, their mixture, and the token store made from them."""

    store: str
    """Folder of the token store, which `prepare` writes and `train` reads."""
    workers: Count | Literal["auto"] = "auto"
    """Maximum number of parallel tasks, which does not affect the bytes of the store. `auto` means one per core of this
    machine, or no limit on a cluster."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Executor of the tasks of `prepare`: local processes, Slurm jobs or a Ray cluster. The bytes of the store do not
    depend on the executor."""
    slurm: Slurm | None = None
    """Resources of the jobs; required if `executor` is slurm."""
    sources: dict[SourceName, Source] = Field(min_length=1)
    """Data sets by name; a name has only letters, digits, `_` and `-`. The store has one folder per data set, with the
    same name."""
    stages: tuple[MixtureStage, ...] = ()
    """Mixture schedule: mixtures that replace the sources' weights, in ascending order of `from_tokens`."""
    document: SpecialTokens = SpecialTokens()
    """Special tokens around each document."""
    validation_fraction: Fraction = 0.0005
    """Fraction of the documents used for validation, in sources without a validation split. A content hash selects the
    documents."""

    @model_validator(mode="after")
    def _check_mixture_schedule(self) -> Self:
        starts = [stage.from_tokens for stage in self.stages]
        if starts != sorted(set(starts)):
            raise ValueError(f"stages begin at {starts}; put them in ascending order")
        for stage, following in pairwise(self.stages):
            if stage.from_tokens + stage.ramp_tokens > following.from_tokens:
                raise ValueError(
                    f"the stage from {following.from_tokens} tokens begins during the ramp of {stage.ramp_tokens} "
                    f"tokens from {stage.from_tokens}; begin it later or shorten ramp_tokens"
                )
        for stage in self.stages:
            for name in stage.weights.keys() - self.sources.keys():
                raise ValueError(
                    f"stages name a source {name!r} that is not in sources; correct the name, or add the source"
                )
            if not sum(stage.weights.values()):
                raise ValueError(
                    f"the weights of the stage from {stage.from_tokens} tokens sum to zero; raise a weight"
                )
        if not sum(source.weight for source in self.sources.values()):
            raise ValueError("the sources' weights sum to zero; raise a weight")
        return self

    @model_validator(mode="after")
    def _check_dependent_fields(self) -> Self:
        for name, source in self.sources.items():
            if source.holdout == "tail" and not self.validation_fraction:
                raise ValueError(f"sources.{name}.holdout is tail, but validation_fraction is 0; raise the fraction")
        if self.executor == "slurm" and self.slurm is None:
            raise ValueError("executor slurm needs data.slurm, with its partition; add it")
        return self
