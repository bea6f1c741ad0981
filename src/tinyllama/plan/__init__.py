"""Estimates of a recipe's resource needs, and checks of whether this machine meets them."""
