"""Trackers: trackio's live page, W&B and TensorBoard, all fed from a run's files.

metrics.jsonl, events.jsonl and releases/ are the record; a follower (`follow`) hands what is new in them to a sink
(`page`, `wandb_sink`, `tensorboard_sink`), in a process of its own beside training (`trackers`) or under `watch`.
"""
