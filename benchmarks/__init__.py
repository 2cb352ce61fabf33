"""Measurements side by side with peers, in one process, told as ratios. Run `python -m benchmarks`."""
