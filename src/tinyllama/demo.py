"""The whole way on the embedded corpus: raw text to a released and evaluated model, in minutes on two CPU cores.

Calls the stages one after the other as the commands do, and prints what came out and where it lies. Each stage goes on
where an interrupted demo stopped.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyllama import plan
from tinyllama.data.corpus import write_corpus
from tinyllama.data.prepare import prepare
from tinyllama.data.sample import train_recipe_tokenizer
from tinyllama.data.store import TokenStore
from tinyllama.errors import InputError
from tinyllama.evaluate.scores import evaluate
from tinyllama.model.generation import complete
from tinyllama.recipe import Recipe
from tinyllama.release import release, update_card
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.loop import run_folder, train
from tinyllama.train.metrics import read_rows
from tinyllama.train.validation import gzip_bits_per_byte, validation_rows

VOCABULARY = 4096
_SAMPLE_BYTES = 12_000_000
_PROMPTS = ("The function returns", "def main():")
