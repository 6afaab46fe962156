"""Benchmarks: how things are timed (``timing``), the baselines, and predicted GPU times."""
