"""Models: packed tokens in, reconstructions or segmentations out; no files, no cluster."""
