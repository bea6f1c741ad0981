"""Releases: folders with a model to publish, from a checkpoint or external weights. The import does not load torch."""
