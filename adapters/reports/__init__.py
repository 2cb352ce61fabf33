"""Reports on adapters: facts, what would load, pages of HTML."""
