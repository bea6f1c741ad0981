"""Imports the parts of benchmarks/gpu.py without the packages that benchmarks/gpu_bundle.py does not pack.

Prints the import names of these packages, then the size of a store, which `tinyllama plan` estimates.
"""

import importlib
import sys
from importlib.metadata import packages_distributions

from packaging.utils import canonicalize_name
from tests.distributions import with_requirements

bundle = importlib.import_module("gpu_bundle")
bundled = with_requirements(["torch", "numpy", *bundle.REQUIREMENTS, *bundle.PEERS])
lacking = with_requirements(["tinyllama"]) - {"tinyllama"} - bundled
for module, distributions in packages_distributions().items():
    if lacking.issuperset(map(canonicalize_name, distributions)):
        sys.modules[module] = None  # type: ignore[assignment]  # an import of the module fails
        print(module)
parts = {part.module for part in importlib.import_module("gpu").PARTS.values()}
for module in (*parts, "tinyllama.cli", "tinyllama.train.loop"):
    importlib.import_module(module)
recipe = importlib.import_module("tinyllama").Recipe.load("tinyllama-1.1b")
print(importlib.import_module("tinyllama.plan.estimate").store_size(recipe, 32_000))
