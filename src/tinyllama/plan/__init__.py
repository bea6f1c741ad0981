"""Estimates of the needs of a recipe, and checks of whether this machine meets them."""
