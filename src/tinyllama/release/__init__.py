"""Releases: a checkpoint, or external weights, as a folder for others. Importing the package loads no torch."""
