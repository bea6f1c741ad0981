"""Prints the settings of torch's allocator in a process that trains."""

import torch

import tinyllama.train  # noqa: F401

print(torch._C._accelerator_getAllocatorSettings())
