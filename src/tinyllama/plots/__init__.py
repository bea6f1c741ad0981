"""Plots for reports, model cards and plans: curves of a run's metrics, and their drawing with matplotlib."""
