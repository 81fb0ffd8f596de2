"""Models: packed tokens in, reconstructions or segmentations out. No Ray, DeepSpeed or filesystem."""
