"""Trackers: trackio's live page, W&B and TensorBoard, all fed from a run's files.

A follower (`follow`) passes new items from the files to a sink (`trackio_sink`, `wandb_sink`, `tensorboard_sink`), in a
process next to training (`trackers`) or in `tinyllama watch` (`watch`).
"""
