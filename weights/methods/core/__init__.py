"""The kinds of layouts, and what several methods share."""
