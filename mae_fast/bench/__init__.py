"""Benchmarks: timing, baselines, data loading, and predicted GPU times."""
