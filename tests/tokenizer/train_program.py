"""Trains a tokenizer of the kind of the second argument, and writes it to the folder of the first argument.

A third argument reverses the texts.
"""

import sys

from tests.conftest import python_sources

from tinyllama.tokenizer.training import train_tokenizer, training_text

folder, kind, *is_reversed = sys.argv[1:]
texts = python_sources(25)
text = training_text(reversed(texts) if is_reversed else texts, kind="bytelevel" if kind == "bytelevel" else "llama2")
train_tokenizer(text, 700).save(folder)
