"""Trains a tokenizer and writes it to the folder of the first argument; the second one reverses the texts."""

import sys

from tests.conftest import python_sources

from tinyllama.tokenizer.training import train_tokenizer, training_text

texts = python_sources(25)
train_tokenizer(training_text(reversed(texts) if "reversed" in sys.argv else texts), 700).save(sys.argv[1])
