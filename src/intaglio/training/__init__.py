"""Assembly of the trainer: device, EMA, checkpoints, history, validation."""
