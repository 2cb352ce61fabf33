"""Tables of names: the layers of an original model, by their names in diffusers or transformers."""

from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[str, str | tuple[str, ...]]
"""The layers that hold the rows of another, by its name.

`{i}` stands for any number. `"norm[2/3]"` is the second of three equal blocks of the rows of `norm`. `"norm[0/1]"` is
none of them: the entry is for models that have this layer.
"""


def under(source: str, target: str, table: Table) -> Table:
    """A table of names inside two modules, one for each naming; an empty name is that of the model itself."""
    return {
        _inside(source, name): tuple(_inside(target, layer) for layer in ((to,) if isinstance(to, str) else to))
        for name, to in table.items()
    }


def same(*names: str) -> Table:
    """A table of names that both namings have."""
    return dict(zip(names, names, strict=True))


def _inside(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


STEPS: Table = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
"""The embedding of a time step, or of another condition."""
MLP: Table = {"in_layer": "linear_1", "out_layer": "linear_2"}
"""Such an embedding in the models of Black Forest Labs."""
