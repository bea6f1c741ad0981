"""The Llama network, and the conversion of its weights to and from Hugging Face's names."""
