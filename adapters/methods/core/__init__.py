"""The base of the methods: specs, branches, formulas, checks, building, initialisation, the catalogue."""
