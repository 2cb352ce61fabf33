"""The tensors of whole differences in foreign files: LyCORIS's Full, and its differences of normalisation layers."""

from weights.methods.core.lycoris import LycorisLayout, read_as_is, write_as_is
from weights.methods.core.rows import RowAxes

LYCORIS = (
    LycorisLayout(  # Of normalisation layers: the first that fits is the one to write.
        "full",
        sets=(frozenset({"diff"}),),
        names={"diff": "w_norm"},
        bias={"diff": "b_norm"},
        read=read_as_is,
        write=write_as_is,
        has_alpha=False,
        holds=lambda tensors: tensors["diff"].ndim == 1,
    ),
    LycorisLayout(
        "full",
        sets=(frozenset({"diff"}),),
        bias={"diff": "diff_b"},
        read=read_as_is,
        write=write_as_is,
        has_alpha=False,
    ),
)

ROWS = RowAxes("full", by_row="diff")
