"""Language identification with py3langid, whose model is part of its package.

The model reads about 2 MB/s, so only an excerpt of each document is classified.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tinyllama.errors import InputError
from tinyllama.recipe.loading import suggest

_PART_CHARACTERS = 512


@lru_cache(maxsize=1)
def identifier() -> Any:
    """Return py3langid's identifier with normalized probabilities; load its model only once per process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415 - needs the extra `clean`

    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    found.nb_ptc = found.nb_ptc.astype(np.float32)  # numpy multiplies float16 several times slower
    return found


def check_languages(languages: Sequence[str], place: str) -> None:
    """Raise InputError if py3langid does not know a language code."""
    for language in languages:
        if language not in identifier().labels:
            code = "give an ISO 639-1 code such as en, de or zh"
            remedy = suggest(language, identifier().labels, otherwise=code)
            raise InputError(f"{place}: unknown language {language!r}; {remedy}")


def excerpt(text: str) -> str:
    """Return the part of a document that is classified: 512 characters at its beginning and 512 in its middle.

    A document of at most 1,024 characters is returned unchanged.
    """
    if len(text) <= 2 * _PART_CHARACTERS:
        return text
    middle = max(len(text) // 2, _PART_CHARACTERS)
    return f"{text[:_PART_CHARACTERS]} {text[middle : middle + _PART_CHARACTERS]}"


def language_reason(text: str, languages: Sequence[str], min_probability: float) -> str | None:
    """Return the reason to drop a document that is probably in none of the languages, or None."""
    language, probability = identifier().classify(excerpt(text))
    if language not in languages:
        return str(language)
    return None if probability >= min_probability else f"{language} with a probability below {min_probability:g}"
