"""Raw text to a token store: reading, cleaning, deduplication, tokenization, on any number of workers."""
