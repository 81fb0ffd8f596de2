"""Benchmarks of the kernels: they need torch, Triton and numpy, nothing else of the platform."""
