"""Targets: the base weights of a model that can be selected, and the patterns that select them."""
