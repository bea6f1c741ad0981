"""Conversion of raw text to a token store on any number of workers: reading, cleaning and tokenization."""
