"""Every target of `make fuzz`: the function that is given bytes, and what a search of it starts from.

What takes bytes gets them as they are; what takes a structure has hypothesis make it of them (`fuzz_one_input`).
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.fuzz import test_models, test_packed, test_readers, test_recipe, test_runs, test_store, test_tokenizer


@dataclass(frozen=True)
class Target:
    """One function that the fuzzer calls."""

    check: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]] = list
    longest: int = 4096
    """Bytes of an input."""


def _structured(test: Any) -> Target:
    """A property of a test in tests/fuzz, whose arguments hypothesis makes of the bytes."""
    return Target(test.hypothesis.fuzz_one_input, _random_bytes)


def _random_bytes() -> list[bytes]:
    """What a structure may be made of: hypothesis turns down what is too short."""
    return [random.Random(number).randbytes(1 << (6 + number % 6)) for number in range(24)]


TARGETS = {
    "recipe": Target(test_recipe.check_recipe, test_recipe.seeds),
    "recipe_fields": _structured(test_recipe.test_any_fields_are_a_recipe_or_one_line),
    "recipe_overrides": _structured(test_recipe.test_any_override_is_taken_or_one_line),
    "token_counts": _structured(test_recipe.test_a_count_of_tokens_is_a_whole_number_or_refused_in_words),
    **{
        f"{format}{suffix}": Target(*test_readers.target(format, suffix), longest=8192)
        for format, suffix in test_readers.PLACES
        if (format, suffix) not in (("slimpajama", ".jsonl.zst"), ("huggingface", ".csv"))  # read as others are
    },
    "lines": _structured(test_readers.test_every_line_is_a_row_or_a_reject_however_it_is_packed),
    "packed": _structured(
        test_packed.test_a_changed_packed_file_is_read_or_refused_and_with_a_checksum_never_as_another_text
    ),
    "columns": _structured(test_readers.test_columns_of_any_type_and_name_give_as_many_rows_or_one_line),
    "store": _structured(test_store.test_any_changed_byte_is_found_and_none_ends_in_a_traceback),
    "manifests": _structured(
        test_store.test_manifests_of_any_content_are_refused_and_with_new_hashes_open_or_are_refused
    ),
    "shards": _structured(test_store.test_any_shards_read_as_one_array),
    "run_bytes": _structured(test_runs.test_a_run_with_changed_bytes_is_told_in_words),
    "run_values": _structured(test_runs.test_a_run_with_other_values_is_told_in_words),
    "config.json": _structured(test_models.test_any_config_json_loads_or_is_refused_in_one_line),
    "weights": _structured(test_models.test_changed_bytes_of_weights_load_or_are_refused_in_one_line),
    "encode": _structured(test_tokenizer.test_any_text_has_its_library_s_ids_and_comes_back),
    "encode_together": _structured(test_tokenizer.test_texts_together_are_as_each_alone),
    "continuation": _structured(test_tokenizer.test_a_continuation_in_pieces_is_the_text_of_all_ids),
    "tokenizer.json": _structured(test_tokenizer.test_any_fields_of_a_tokenizer_json_are_one_or_one_line),
    "tokenizer.model": Target(test_tokenizer.check_model, test_tokenizer.seeds, longest=1 << 16),
    "words": _structured(test_recipe.test_any_words_are_a_call_or_one_line),
}


if __name__ == "__main__":
    print(*TARGETS)
