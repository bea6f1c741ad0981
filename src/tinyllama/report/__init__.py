"""A run as one HTML file, to attach, print or archive: what it is, how it went and what came of it."""
