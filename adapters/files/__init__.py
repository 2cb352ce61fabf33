"""Adapters in files: loaded into models, merged into checkpoints, extracted, resized, combined."""
