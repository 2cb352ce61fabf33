"""The tensors of LyCORIS's GLoRA in foreign files."""

from weights.adapter_file import LayerWeights
from weights.methods.core.lycoris import LycorisLayout, Read, Tensors, Written, alpha_or_rank, number
from weights.methods.core.rows import RowAxes


def _read(tensors: Tensors, alpha: float | None) -> Read:
    rank = tensors["a2"].shape[0]
    return {"rank": rank, "alpha": alpha_or_rank(alpha, rank)}, dict(tensors)


def _write(layer: LayerWeights) -> Written:
    if number(layer, "alpha") == 0:
        raise ValueError("an alpha of 0, which would stand for the rank")
    return dict(layer.tensors), number(layer, "alpha")


LYCORIS = LycorisLayout(
    "lycoris-glora",
    sets=(frozenset({"a1", "a2", "b1", "b2"}),),
    names={name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")},
    read=_read,
    write=_write,
)

ROWS = RowAxes("lycoris-glora", by_row="b1", common="a1 a2 b2")
