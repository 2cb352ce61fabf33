"""The kind of a family, the tables of names that several share, and the search in all of them."""
