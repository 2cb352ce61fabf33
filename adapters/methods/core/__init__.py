"""The base of the methods: weight specs, branches, formulas, checks, building, initialisation, the catalogue."""
