"""Measurements side by side with peers, in one process, as ratios. Run `python -m benchmarks`."""
