"""Sources: one file per way that studies lie on disk; each yields studies and refusals."""
