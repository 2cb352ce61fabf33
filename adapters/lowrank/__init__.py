"""Low-rank updates: computed beside a linear layer, added to weights in place, decomposed, measured."""
