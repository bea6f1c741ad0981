"""Compiles and runs a function after the imports of training."""

import tinyllama.train.loop  # noqa: F401, I001 - sets the folder of the compile cache before torch is imported
import torch

torch.compile(lambda x: (x + 1).cos())(torch.ones(8))
