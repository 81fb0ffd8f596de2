"""Whether a cluster, or this machine, is fit for training: `anycontrast doctor`."""
