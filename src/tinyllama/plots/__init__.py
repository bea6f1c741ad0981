"""Plots for reports, model cards and plans: curves of a run's metrics, drawn with matplotlib."""
