"""Training: configuration, engine, loop, checkpoints and placement on a cluster."""
