"""Kinds of files by their names: rows, code, prose, and text that is not for training.

The survey also reads each file, so a name never makes a binary file text.
"""

from pathlib import Path

from tinyllama.prepare.sources import split_suffixes

JSON_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
ROW_ENDINGS = (*JSON_ENDINGS, ".csv", ".parquet", ".arrow")
"""Endings of files with rows, whose text is in a field or column."""
_CODE = (
    ".adb .ads .asm .awk .bash .bat .bzl .c .cc .cfg .clj .cljs .cmake .cpp .cs .css .cu .cuh .cxx .d .dart .diff .el "
    ".erl .ex .exs .f .f90 .fs .glsl .go .gradle .groovy .h .hcl .hh .hpp .hs .htm .html .hxx .inc .ini .ipp .java .jl "
    ".js .jsx .kt .kts .less .lisp .lua .m .m4 .mk .ml .mli .mm .nim .nix .pas .patch .php .pl .pm .proto .ps1 .pxd "
    ".py .pyi .pyx .r .rb .rs .s .sass .scala .scm .scss .sh .sql .sv .swift .tcl .tf .tmpl .toml .ts .tsx .v .vb .vhd "
    ".vim .vue .wgsl .xml .xsd .xsl .yaml .yml .zig .zsh"
)
_CODE_ENDINGS = frozenset(_CODE.split())
_CODE_NAMES = frozenset(("Makefile", "makefile", "GNUmakefile", "Dockerfile", "Rakefile", "Gemfile"))
_PROSE_ENDINGS = frozenset(
    (".adoc", ".asciidoc", ".log", ".markdown", ".md", ".mdx", ".org", ".rst", ".rtx", ".tex", ".text", ".txt", ".wiki")
)
_PROSE_NAMES = frozenset(("AUTHORS", "CHANGELOG", "CHANGES", "HACKING", "HISTORY", "INSTALL", "NEWS", "README", "TODO"))
NOT_PROSE = {
    **dict.fromkeys((".svg", ".eps", ".ps", ".pdf"), "pictures or pages, not text"),
    **dict.fromkeys((".map", ".lock", ".sum", ".pem", ".crt", ".key", ".asc", ".sig", ".b64"), "generated, not text"),
    **dict.fromkeys((".tsv", ".ipynb", ".geojson"), "data in a format that tinyllama does not read"),
}
"""Reason to skip files that are UTF-8 but not text to train on, by ending."""


def is_known_code(path: str) -> bool:
    """Return whether a file's name is that of code or markup."""
    return split_suffixes(path)[1] in _CODE_ENDINGS or Path(path).name in _CODE_NAMES


def is_known_text(path: str) -> bool:
    """Return whether a file's name is that of code, markup or prose."""
    return is_known_code(path) or split_suffixes(path)[1] in _PROSE_ENDINGS or Path(path).name in _PROSE_NAMES
