"""The benchmark engine: how things are timed, what is timed beside what, and what is said of it."""

from .timing import commit, graphed, interleave, machine, peak_memory, ratio

__all__ = ["commit", "graphed", "interleave", "machine", "peak_memory", "ratio"]
