"""The one trainer: steps, DeepSpeed, checkpoints, metrics. Knows no architecture and no Ray."""
