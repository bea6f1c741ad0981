"""Export of a run's metrics, events and scores to trackers: trackio, W&B and TensorBoard.

A follower (`follow`) passes new metrics, events and scores from the run's files to a sink (`trackio_sink`,
`wandb_sink`, `tensorboard_sink`). The follower runs in a sidecar process of training (`trackers`).
"""
