"""Studies on disk in, packed batches out."""
