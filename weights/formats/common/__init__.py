"""The kind of a format, the probe that formats look at, and what several of them share."""
