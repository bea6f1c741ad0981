"""Quality filters of datatrove, with words and sentences that regular expressions split, and with shortcuts for speed.

datatrove loads spaCy to split text. Here, only languages without spaces between words need datatrove's splitters and
their packages. The regular expressions split English text almost like spaCy, because the filters' thresholds were
chosen for such words (docs/log.md has the agreement). numpy computes the rules about words, with the thresholds and the
results of datatrove's filters.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline import filters
from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION, split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer, load_tokenizer_assignments, load_word_tokenizer
from numpy.typing import NDArray

from tinyllama.prepare.ngrams import MULTIPLIER
from tinyllama.recipe import Cleaning

_UNSPACED = {"BurmeseTokenizer", "KhmerTokenizer", "LaoTokenizer", "ThaiTokenizer", "TibetanTokenizer", "ja", "zh"}
"""datatrove's splitters, and the languages of spaCy's splitters, for text without spaces between words."""
_SPACED = {"ms", "msa", "tl"}
"""Malay, to which datatrove assigns the splitter of Thai, and Tagalog, which it knows as fil and tgl only."""
_MAX_CHARACTERS = 5_000_000
"""Maximum document length for filters, in characters; a filter's list of words takes up to 120 bytes per character."""
_MAX_VOCABULARY = 500_000
"""Number of words after which the vocabulary of the shortcuts is cleared, between two documents."""
_LETTER = r"[^\W\d_]"
# Punctuation within a word does not split it: x_y, 3.14, f(x). As in spaCy, there are exceptions: a contraction, "..",
# one sign between two letters (and/or, well-known), and a full stop between two sentences without a space.
_SPLIT = rf"['\u2019]\w|\.\.|(?<={_LETTER})[-\u2013\u2014,:<>=/~](?={_LETTER})|(?<=[a-z])\.(?=[A-Z])"
_RUN = rf"\w++(?:://\S*\w/?|(?:(?=[^\w\s])(?!{_SPLIT})[^\w\s]++\w++)*+)"
_PREFIX = r"[-/~|^@\\]++"  # signs that belong to the word that follows: -1, /usr, @name
_WORD = re.compile(rf"{_RUN}|(?<!\w){_PREFIX}(?:{_RUN})?|(?<=\w)['\u2019]\w++|\.\.++|{_PREFIX}|\S")
# Python's re compares a character with each character above U+FFFF in turn; no language of `clean.language` has these.
_OTHER_ENDS = re.escape("".join(sorted(mark for mark in TERMINAL_PUNCTUATION - {"."} if mark < "\U00010000")))
# A full stop after a single letter ends no sentence (e.g., J. Smith), and an ellipsis does not either.
_SENTENCE_END = re.compile(
    rf"[.{_OTHER_ENDS}](?<!\b\w\.)(?<!\.\.)(?!\.)[{_OTHER_ENDS}]*+(?:[\"'\u201d\u2019)\]\xbb]*+(?=\s|$)|(?<=[a-z]\.)(?=[A-Z]))"
)


class _RegexTokenizer(WordTokenizer):  # type: ignore[misc]  # datatrove has no type hints for mypy
    """Splitter into words and sentences for languages with spaces between words."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return words, numbers and punctuation marks in order."""
        return _WORD.findall(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return the first and last position of each sentence."""
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(pairwise([0, *ends]))

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences in order."""
        return [text[start:end] for start, end in self.span_tokenize(text)]


class _SpaceTokenizer(_RegexTokenizer):
    """Splitter at spaces, which finds at most as many words as any other splitter."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the parts between spaces."""
        return text.split()


@lru_cache
def word_tokenizer(language: str) -> WordTokenizer:
    """Return the splitter for an ISO 639 language code.

    Raises ValueError if the code is unknown, ImportError if the splitter needs a package that is not installed.
    """
    if language in _SPACED:
        return _RegexTokenizer()
    assignments = load_tokenizer_assignments()
    # By default, datatrove splits the text of `zh` as Latin letters.
    code = next((code for code in (f"{language}_Hani", language) if code in assignments), None)
    if code is None:
        raise ValueError(f"unknown language {language!r}")
    if _UNSPACED.isdisjoint(assignments[code].args):
        return _RegexTokenizer()
    tokenizer: WordTokenizer = load_word_tokenizer(code)
    tokenizer.word_tokenize("one word")  # imports the packages
    return tokenizer


def quality_check(name: str, cleaning: Cleaning) -> Callable[[Document], str | None]:
    """Return a datatrove filter as a check, with the default thresholds, which come from the filter's paper."""
    tokenizer = word_tokenizer(cleaning.language)
    match name:
        case "gopher_repetition":
            decide = _repetition_check(tokenizer)
        case "gopher_quality":
            # The stop words of the Gopher paper are English, so texts in other languages need not contain them.
            decide = _gopher_quality_check(tokenizer, None if cleaning.language != "en" else 2)
        case "c4":
            decide = _c4_check(tokenizer, cleaning.c4_terminal_punctuation)
        case _:
            decide = _fineweb_check(tokenizer)

    def check(document: Document) -> str | None:
        if len(document.text) > _MAX_CHARACTERS:
            return f"over {_MAX_CHARACTERS:,} characters, too long for filters"
        return decide(document)

    return check


def _reason(result: Any) -> str | None:
    """Return the reason in the result of a datatrove filter, or None if the filter keeps the document."""
    return None if result is True else str(result[1])


def _repetition_check(tokenizer: WordTokenizer) -> Callable[[Document], str | None]:
    lines = filters.GopherRepetitionFilter(language=tokenizer, top_n_grams=(), dup_n_grams=())
    rules = filters.GopherRepetitionFilter(language=tokenizer)

    def decide(document: Document) -> str | None:
        if reason := _reason(lines.filter(document)):
            return reason
        words, codes = split_into_words(document.text, tokenizer), _word_codes(document.text, tokenizer)
        return _repeated_ngrams(rules, document.text, words, codes)

    return decide


def _gopher_quality_check(tokenizer: WordTokenizer, min_stop_words: int | None) -> Callable[[Document], str | None]:
    rules = filters.GopherQualityFilter(language=tokenizer, min_stop_words=min_stop_words)

    def decide(document: Document) -> str | None:
        words, codes = split_into_words(document.text, tokenizer), _word_codes(document.text, tokenizer)
        return _broken_quality_rule(rules, document.text, words, codes)

    return decide


def _c4_check(tokenizer: WordTokenizer, terminal_punctuation: bool) -> Callable[[Document], str | None]:
    min_sentences = filters.C4QualityFilter().min_num_sentences
    lines = filters.C4QualityFilter(
        language=tokenizer, filter_no_terminal_punct=terminal_punctuation, min_num_sentences=-1
    )
    lines.stat_update = lambda *_, **__: None  # datatrove's counts of lines take a fifth of the time

    def decide(document: Document) -> str | None:
        if reason := _reason(lines.filter(document)):
            return reason
        counts = (len(tokenizer.span_tokenize(line)) for line in document.text.splitlines())
        has_enough = any(total >= min_sentences for total in accumulate(counts))  # counts until there are enough
        return None if has_enough else "too_few_sentences"

    return decide


def _fineweb_check(tokenizer: WordTokenizer) -> Callable[[Document], str | None]:
    fast = filters.FineWebQualityFilter(language=_SpaceTokenizer())
    complete = filters.FineWebQualityFilter(language=tokenizer)

    def decide(document: Document) -> str | None:
        # This filter only drops documents with few words per line, and spaces split a text into the fewest words.
        return _reason(fast.filter(document)) and _reason(complete.filter(document))

    return decide


class _Vocabulary(dict[str, int]):
    """Code of each word.

    A code consists of a number, the word's length in characters, whether the word contains a letter, and whether it
    contains a character other than punctuation.
    """

    def __missing__(self, word: str) -> int:
        has_letter, is_word = any(map(str.isalpha, word)), not PUNCTUATION_SET.issuperset(word)
        self[word] = code = len(self) << 32 | len(word) << 2 | has_letter << 1 | is_word
        return code


_vocabulary = _Vocabulary()


@lru_cache(maxsize=1)  # shared by two filters
def _word_codes(text: str, tokenizer: WordTokenizer) -> NDArray[np.uint64]:
    """Return the code of each word of a text: [words]."""
    if len(_vocabulary) > _MAX_VOCABULARY:
        _vocabulary.clear()
    words = split_into_words(text, tokenizer)
    return np.fromiter(map(_vocabulary.__getitem__, words), np.uint64, len(words))


def _lengths(codes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (codes & np.uint64(0xFFFFFFFF)).astype(np.int64) >> 2


def _repeated_ngrams(rules: Any, text: str, words: list[str], codes: NDArray[np.uint64]) -> str | None:
    """Return the rule of the Gopher paper about n-grams that a text breaks, or None.

    datatrove counts the characters of disjoint duplicate n-grams one by one. The characters of all words in duplicate
    n-grams are an upper bound, which is below the limit for most texts. The bound for n = 5 applies to all n > 5,
    because a duplicate n-gram consists of duplicate 5-grams.
    """
    lengths, keys, max_count = _lengths(codes), codes, len(codes)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    top_limits, limits = dict(rules.top_n_grams), dict(rules.dup_n_grams)
    for n in range(2, min(max(limits), len(words)) + 1):
        keys = keys[:-1] * MULTIPLIER + codes[n - 1 :]
        characters = ends[n:] - ends[:-n] + n - 1
        # No n-gram occurs more often than the most frequent shorter n-gram.
        if n not in limits and max_count * characters.max() / len(text) <= top_limits[n]:
            continue
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        max_count = counts.max()
        start = first[counts == max_count].min()  # the first of the most frequent n-grams
        if n in top_limits and characters[start] * max_count / len(text) > top_limits[n]:
            return f"top_{n}_gram"
        if n in limits:
            is_duplicate = np.ones(len(keys), dtype=np.int64)
            is_duplicate[first] = 0
            in_duplicate = np.convolve(is_duplicate, np.ones(n, dtype=np.int64)) > 0  # [words]
            bound = lengths[in_duplicate].sum() / len(text)
            if bound <= min(limits.values()):
                return None
            if bound > limits[n] and find_all_duplicate(words, n) / len(text) > limits[n]:
                return f"duplicated_{n}_n_grams"
    return None


def _broken_quality_rule(rules: Any, text: str, words: list[str], codes: NDArray[np.uint64]) -> str | None:
    """Return the first rule of the Gopher paper about quality that a text breaks, or None."""
    is_word, lines = (codes & np.uint64(1)).astype(bool), text.splitlines()
    count, num_words, num_lines = max(1, len(words)), int(is_word.sum()), max(1, len(lines))
    mean_length = _lengths(codes)[is_word].sum() / max(1, num_words)
    ellipses = text.count("...") + text.count("…")
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    cut_lines = sum(line.rstrip().endswith(("...", "…")) for line in lines) if ellipses else 0
    with_letter = int((codes >> np.uint64(1) & np.uint64(1)).sum())
    is_broken = {
        "gopher_short_doc": num_words < rules.min_doc_words,
        "gopher_long_doc": num_words > rules.max_doc_words,
        "gopher_below_avg_threshold": mean_length < rules.min_avg_word_length,
        "gopher_above_avg_threshold": mean_length > rules.max_avg_word_length,
        "gopher_too_many_hashes": text.count("#") / count > rules.max_symbol_word_ratio,
        "gopher_too_many_ellipsis": ellipses / count > rules.max_symbol_word_ratio,
        "gopher_too_many_bullets": bullets / num_lines > rules.max_bullet_lines_ratio,
        "gopher_too_many_end_ellipsis": cut_lines / num_lines > rules.max_ellipsis_lines_ratio,
        "gopher_below_alpha_threshold": with_letter / count < rules.max_non_alpha_words_ratio,
        "gopher_enough_stop_words": len(rules.stop_words.intersection(words)) < (rules.min_stop_words or 0),
    }
    return next((reason for reason, value in is_broken.items() if value), None)
