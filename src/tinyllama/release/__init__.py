"""Releases: folders with a checkpoint or external weights for publication. Importing the package loads no torch."""
