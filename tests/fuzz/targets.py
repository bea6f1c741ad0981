"""The targets of `make fuzz`: a function of bytes, and the inputs that its search starts from.

A target of structured values has hypothesis draw them from the bytes (`fuzz_one_input`).
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tests.fuzz import test_models, test_packed, test_readers, test_recipe, test_runs, test_store, test_tokenizer


@dataclass(frozen=True)
class Target:
    """A function that the fuzzer calls."""

    check: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]] = list
    max_bytes: int = 4096
    """Largest input in bytes."""


def _structured(test: Any) -> Target:
    """Return the target of a property test whose arguments hypothesis draws from the bytes."""
    return Target(test.hypothesis.fuzz_one_input, _random_bytes)


def _random_bytes() -> list[bytes]:
    """Return seeds for structured targets: hypothesis rejects inputs that are too short."""
    return [random.Random(number).randbytes(1 << (6 + number % 6)) for number in range(24)]


TARGETS = {
    "recipe": Target(test_recipe.check_recipe, test_recipe.seeds),
    "recipe_fields": _structured(test_recipe.test_any_fields_are_a_recipe_or_one_line),
    "recipe_overrides": _structured(test_recipe.test_any_override_is_accepted_or_one_line),
    "token_counts": _structured(test_recipe.test_token_count_is_an_integer_or_a_clear_error),
    **{
        f"{format}{suffix}": Target(*test_readers.target(format, suffix), max_bytes=8192)
        for format, suffix in test_readers.PLACES
        if (format, suffix) not in (("slimpajama", ".jsonl.zst"), ("huggingface", ".csv"))  # covered by other suffixes
    },
    "lines": _structured(test_readers.test_every_line_is_a_row_or_a_reject_in_any_compression),
    "packed": _structured(test_packed.test_mutated_compressed_file_never_gives_other_text_with_checksum),
    "columns": _structured(test_readers.test_columns_of_any_type_and_name_are_read_or_one_line),
    "store": _structured(test_store.test_any_changed_byte_is_found_without_traceback),
    "manifests": _structured(test_store.test_mutated_manifest_is_found_and_rehashed_opens_or_is_refused),
    "shards": _structured(test_store.test_any_shards_read_as_one_array),
    "run_bytes": _structured(test_runs.test_run_with_mutated_bytes_is_used_or_one_line),
    "run_values": _structured(test_runs.test_run_with_mutated_values_is_used_or_one_line),
    "config.json": _structured(test_models.test_any_config_json_loads_or_is_one_line),
    "weights": _structured(test_models.test_mutated_weights_load_or_are_one_line),
    "encode": _structured(test_tokenizer.test_any_text_has_its_library_ids_and_decodes_to_itself),
    "encode_together": _structured(test_tokenizer.test_texts_of_one_block_do_not_change_each_other),
    "continuation": _structured(test_tokenizer.test_streamed_text_equals_text_of_all_ids),
    "tokenizer.json": _structured(test_tokenizer.test_mutated_tokenizer_json_is_used_or_one_line),
    "tokenizer.model": Target(test_tokenizer.check_model, test_tokenizer.seeds, max_bytes=1 << 16),
    "words": _structured(test_recipe.test_any_arguments_are_a_call_or_one_line),
}


if __name__ == "__main__":
    print(*TARGETS)
