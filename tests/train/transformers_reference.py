"""The model and the optimizer of transformers and torch that training is compared with, step by step."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama.model.weights import config_to_hugging_face, to_hugging_face
from tinyllama.train.setup import TrainState


def transformers_reference(state: TrainState) -> tuple[LlamaForCausalLM, torch.optim.AdamW]:
    """Return transformers' model with the state's weights, in float32, and an optimizer with the recipe's settings."""
    config = config_to_hugging_face(state.recipe.model, state.tokenizer.vocab_size, 1, 2) | {"dtype": "float32"}
    reference = LlamaForCausalLM(LlamaConfig(**config))
    reference.load_state_dict(dict(to_hugging_face(state.model.state_dict(), state.recipe.model)))
    matrices = [parameter for parameter in reference.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in reference.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return reference, torch.optim.AdamW(groups, betas=(0.9, 0.95))
