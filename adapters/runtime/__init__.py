"""Adapted layers: how they run, their fast path, merged weights, transparency, compiled graphs."""
