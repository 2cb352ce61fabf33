"""The tensors of copied parameters in foreign files: ComfyUI's `set_weight`, the weight itself."""

from weights.methods.core.lycoris import LycorisLayout, read_as_is
from weights.methods.core.rows import RowAxes

LYCORIS = LycorisLayout(
    "copy",
    sets=(frozenset({"weight"}),),
    names={"weight": "set_weight"},
    read=read_as_is,
    write=None,
    has_alpha=False,
)

ROWS = RowAxes("copy", by_row="weight bias")
