"""Benchmarks: `anycontrast bench NAME`; each module measures one thing in one run."""
