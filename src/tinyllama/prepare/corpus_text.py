"""Cleaning for the embedded corpus: pure functions from the text of a file to English paragraphs or to code.

Prose is judged by the paragraph, after C4 and Gopher (eight words, a fifth of them stop words, a closing mark);
its markup is taken off and its hard line breaks are undone, so that it reads as text from the web does.
Code is judged by the file, after StarCoder: the length of its lines, its share of letters, signs of a generator.
"""

import ast
import inspect
import re
from collections.abc import Iterator

# Runs of comments and every kind of string, so that a quote inside one of them opens nothing.
PYTHON_TOKEN = re.compile(
    r"#[^\n]*(?:\n[ \t]*#[^\n]*)*+"
    r'|"""(?:[^"\\]++|\\.|"(?!""))*+"""|"(?:[^"\\\n]|\\.)*+"'
    r"|'''(?:[^'\\]++|\\.|'(?!''))*+'''|'(?:[^'\\\n]|\\.)*+'",
    re.DOTALL,
)
COMMENT_MARK = re.compile(r"^[ \t]*#[#!:]*[ \t]?", re.MULTILINE)
# Each with a mark without which it finds nothing, since most texts have no markup.
BLOCK_MARKUP = [
    (mark, re.compile(pattern, re.MULTILINE), replacement)
    for mark, pattern, replacement in [
        ("", r"^[ \t]*(`{3,}|~{3,})(?s:.*?)^[ \t]*\1", ""),  # fenced code
        ("", r"<!--(?s:.*?)-->|!\[[^\]]*\]\([^)]*\)", ""),  # HTML comments, Markdown images
        ("<", r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>", ""),  # HTML tags
        ("", r"^([^\s#].{0,70}+)\n[=~^\"*#+-]{3,}[ \t]*$", r"\n# \1\n"),  # underlined headings
        ("#", r"^#{1,6} (.+?)#*$", r"\n# \1\n"),
        (">", r"^[ \t]*> ?(?!>)", ""),  # quotations
        ("::", r"::[ \t]*$", ":"),
    ]
]
INLINE_MARKUP = [
    (mark, re.compile(pattern), replacement)
    for mark, pattern, replacement in [
        ("](", r"\[([^\]\[]*)\]\([^)\s]*\)", r"\1"),  # Markdown links
        ("`", r"(?::[\w:+.-]+:)?`[~!]?([^`<]+?)\s*<[^>`]*>`_{0,2}", r"\1"),  # reStructuredText links
        ("`", r":[\w:+.-]+:`[~!]?([^`]+)`", r"`\1`"),  # reStructuredText roles
        ("``", r"``([^`]+)``", r"`\1`"),
        ("_", r"\s*\[[\w#*]+\]_|(?<=`)__?(?!\w)", ""),  # footnotes, references
        ("**", r"(?<!\w)\*\*([^*]+)\*\*(?!\w)", r"\1"),
    ]
]
ITEM = re.compile(r"\s*(?:[-*+•] |\(?\w{1,2}[.)] |[:@]\w|[\w*`,. ()\[\]\"'|-]{1,60}+: )")
DEFINITION = re.compile(r"\s*[\w*`,. ]{1,40}+(?<= ): ")
HYPHENATED = re.compile(r"\w-$")
CLOSING_MARKS = (".", "!", "?", ":", ".)", '."', ".'", ".`")
WORD = re.compile(r"[^\W\d_]+")
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be been but by can do does for from has have how if in into is it its may more no
        not of on one only or should so such than that the their them then there these they this to use used was
        we when where which will with would you your""",
    )
)
COMMENT_HEAD = re.compile(r"\A(?:[ \t]*(?:#(?![a-z!]).*|//.*|/\*(?s:.*?)\*/[ \t]*|<!--(?s:.*?)-->[ \t]*)?\n)+")
GENERATED = re.compile(r"@generated|auto-?\s?generated|generated (?:by|from)|do not (?:edit|modify)", re.I)
CPLUSPLUS = re.compile(r"^\s*(?:namespace|class|using|template)\b|\w::\w", re.MULTILINE)
NUMBER = re.compile(r"\b\d\w*")
LETTERS = bytes(range(ord("A"), ord("Z") + 1)) + bytes(range(ord("a"), ord("z") + 1))


def documentation(source: str) -> Iterator[str]:
    """Yield what Python or Cython source says in words: docstrings, and comments of 150 characters or more.

    A docstring is a triple-quoted string that opens its line, so those of attributes count; it is dedented.
    """
    for token in PYTHON_TOKEN.finditer(source):
        text = token[0]
        if text.startswith("#") and len(text) >= 150:
            yield COMMENT_MARK.sub("", text)
        elif text.startswith(('"""', "'''")):
            prefix = source[source.rfind("\n", 0, token.start()) + 1 : token.start()].strip().lower()
            if prefix in ("", "u", "r"):
                is_raw = prefix == "r" or "\\" not in text
                yield inspect.cleandoc(text[3:-3] if is_raw else unescape(text))


def unescape(literal: str) -> str:
    """The value of a string literal; an invalid one (broken source among test data) is empty."""
    try:
        return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return ""


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of plain, Markdown or reStructuredText text that read as English, without markup.

    A heading, or a paragraph that announces what follows it, is kept only before a paragraph that is kept.
    """
    if len(text) < 40:
        return
    text = substitute(BLOCK_MARKUP, text)
    lead = ""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        paragraph = substitute(INLINE_MARKUP, unwrap(block))
        if paragraph.startswith("# "):
            lead = paragraph[2:] + "\n"
        elif not is_prose(paragraph):
            lead = ""
        elif paragraph.endswith((":", "e.g.", "i.e.")):
            lead += paragraph + "\n"
        else:
            yield lead + paragraph
            lead = ""


def substitute(replacements: list[tuple[str, re.Pattern[str], str]], text: str) -> str:
    """Apply regular expressions one after the other, each where its mark stands."""
    for mark, pattern, replacement in replacements:
        if mark in text:
            text = pattern.sub(replacement, text)
    return text


def unwrap(block: str) -> str:
    """Join the lines of a paragraph that were broken at a margin."""
    first, *rest = block.split("\n")
    lines = [first]
    for previous, line in zip([first, *rest], rest, strict=False):
        if is_wrapped_line(previous.rstrip(), line):
            lines[-1] += line.strip() if HYPHENATED.match(lines[-1][-2:]) else " " + line.strip()
        else:
            lines.append(line)
    return "\n".join(line[: indentation(line)] + " ".join(line.split()) for line in lines)


def is_wrapped_line(previous: str, line: str) -> bool:
    """Whether a line goes on where the line above it broke off: after 45 characters, or in mid-sentence."""
    deeper = indentation(line) - indentation(previous)
    if deeper < 0 or previous.endswith(":") or ITEM.match(line) or (deeper and DEFINITION.match(previous)):
        return False
    in_mid_sentence = line.lstrip()[:1].islower() and not previous.endswith(CLOSING_MARKS)
    return len(previous) >= 45 or (deeper == 0 and in_mid_sentence)


def indentation(line: str) -> int:
    """Leading blanks of a line, in characters."""
    return len(line) - len(line.lstrip())


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph has eight words, a fifth of them stop words, mostly letters, and a closing mark."""
    if not paragraph.endswith(CLOSING_MARKS) or paragraph.lstrip().startswith((">>>", "..", "|", "$", "%")):
        return False
    words = WORD.findall(paragraph)
    num_stop_words = sum(word.lower() in STOP_WORDS for word in words)
    mostly_letters = sum(map(len, words)) >= 0.75 * len("".join(paragraph.split()))
    return len(words) >= 8 and num_stop_words >= 0.2 * len(words) and mostly_letters


def edges(paragraph: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The first and the last eight words of a paragraph, which tell it from all but its near-duplicates."""
    words = WORD.findall(paragraph)
    return tuple(words[:8]), tuple(words[-8:])


def word_ngrams(text: str) -> Iterator[tuple[str, ...]]:
    """Yield every eight successive words of a text, whatever stands between them."""
    words = WORD.findall(text)
    return zip(*(words[start:] for start in range(8)), strict=False)


def is_cpp(header: str) -> bool:
    """Whether a .h file is C++ and not C."""
    return CPLUSPLUS.search(header) is not None


def code_reject_reason(text: str) -> str | None:
    """Why a file is no code to learn from, or None: StarCoder's rules, but half of it must be letters."""
    if not 300 <= len(text) <= 250_000:  # a longer file is mostly a table
        return "too short or too long"
    if GENERATED.search(text, 0, 600):
        return "generated"
    lines = text.split("\n")
    num_visible = sum(map(len, text.split()))
    if max(map(len, lines)) > 500 or len(text) > 100 * len(lines) or num_visible > 0.9 * len(text):
        return "minified"
    encoded = NUMBER.sub("", text).encode()
    if len(encoded) - len(encoded.translate(None, LETTERS)) < 0.5 * num_visible:
        return "few letters"
    return None


def strip_repeated_license(text: str, known_heads: set[str]) -> str:
    """Source code without its opening comment where an earlier file began with the same words, as licences do."""
    head = COMMENT_HEAD.match(text)
    if head is None:
        return text
    words = " ".join(WORD.findall(head[0]))
    if words in known_heads:
        return text[head.end() :]
    known_heads.add(words)
    return text
