"""Which patches are active: switches, strengths, mixed batches."""
