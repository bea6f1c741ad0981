"""The Llama 2 network and its weights under other names."""
