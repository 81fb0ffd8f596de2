"""Evaluation: whole-volume inference, metrics per contrast subset, tables and pictures."""
