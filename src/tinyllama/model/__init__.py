"""The Llama 2 network, and the conversion of its weights to and from Hugging Face's names."""
