"""Trackers that show a run's files: trackio's live page, W&B and TensorBoard.

A follower (`follow`) passes new items from the files to a sink (`trackio_sink`, `wandb_sink`, `tensorboard_sink`). The
follower runs in a process next to training (`trackers`) or in `tinyllama watch` (`watch`).
"""
