"""Program that fails if the package, its torch-free public names or a run import packages that they do not need."""

import sys

import tinyllama

dir(tinyllama)
assert not sys.modules.keys() & {"numpy", "pydantic"}, "the package imports packages that only its functions need"
for name in ("InputError", "Recipe", "Run", "TokenStore", "Tokenizer", "prepare_store", "train_model"):
    getattr(tinyllama, name)
    assert "torch" not in sys.modules, name
assert len(tinyllama.Run.open(sys.argv[1]).metrics["loss"]) == 2
assert "torch" not in sys.modules
