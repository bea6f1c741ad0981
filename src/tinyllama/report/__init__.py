"""Reports: one HTML file per run with its recipe, progress and results, to attach, print or archive."""
