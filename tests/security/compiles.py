"""Compiles a function after importing what training imports, and computes it."""

import tinyllama.train.loop  # noqa: F401, I001 - sets the folder of the compile cache before torch is imported
import torch

torch.compile(lambda x: (x + 1).cos())(torch.ones(8))
