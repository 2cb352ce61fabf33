"""The names in an adapter file become the paths of a model or a checkpoint."""
