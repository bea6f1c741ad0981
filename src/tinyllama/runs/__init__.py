"""The folder of a run: its log, events, checkpoints and releases."""
