"""Patches: named sets of branches in a model, and what is done with them."""
