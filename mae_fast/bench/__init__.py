"""Benchmarks: how things are timed (``timing``), the rivals, and predicted GPU times."""
