"""Files on disk: paths, locks, atomic writes."""
