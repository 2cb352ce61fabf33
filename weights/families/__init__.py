"""Families of models: the names of their layers in original checkpoints and in diffusers and transformers."""
