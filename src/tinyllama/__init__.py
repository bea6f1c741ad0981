"""Pretrain small Llama models: one recipe from raw text to a released model."""
