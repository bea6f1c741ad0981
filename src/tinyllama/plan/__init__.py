"""What a recipe will need."""

from tinyllama.model.flops import flops_by_formula, flops_per_token, num_parameters, parameters_by_part

__all__ = ["flops_by_formula", "flops_per_token", "num_parameters", "parameters_by_part"]
