"""Reports: one self-contained HTML file per run, with the run's recipe, progress and results."""
