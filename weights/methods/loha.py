"""LoHa's and DoHa's tensors in foreign files."""

from __future__ import annotations

from torch import Tensor

from weights.adapter_file import LayerWeights
from weights.methods.core.lycoris import LycorisLayout, Read, Tensors, Written, alpha_or_rank, decomposed, with_alpha
from weights.methods.core.peft import RANK_AND_ALPHA_PATTERNS, PeftLayout
from weights.methods.core.rows import RowAxes

_FACTORS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_CORES = frozenset({"hada_t1", "hada_t2"})

PEFT_SETTINGS = {
    "rank": ("r", 8),
    "alpha": ("alpha", 8.0),
    "tucker": ("use_effective_conv2d", False),
}
PEFT_INERT = frozenset({"module_dropout", "rank_dropout", "rank_dropout_scale"})


def in_two_positions(name: str, tensor: Tensor) -> Tensor:
    """A core as PEFT has it: its kernel has two dimensions, also for a Conv1d."""
    return tensor.unsqueeze(-1) if name in (*_CORES, "lokr_t2") and tensor.ndim == 3 else tensor


PEFT = PeftLayout(
    "loha",
    "LOHA",
    settings=PEFT_SETTINGS,
    patterns=RANK_AND_ALPHA_PATTERNS,
    tensors={name: name for name in (*sorted(_FACTORS), *sorted(_CORES))},
    optional=_CORES,
    pairs=(("hada_t1", "hada_t2"),),
    inert=PEFT_INERT,
    written=in_two_positions,
)


def _read(tensors: Tensors, alpha: float | None) -> Read:
    rank = tensors["hada_w1_b"].shape[0]
    return {"rank": rank, "alpha": alpha_or_rank(alpha, rank), "tucker": "hada_t1" in tensors}, dict(tensors)


def _write(layer: LayerWeights) -> Written:
    return with_alpha(layer, "hada_w1_a")


_SETS = (_FACTORS, _FACTORS | _CORES)
LYCORIS = (
    LycorisLayout("loha", sets=_SETS, read=_read, write=_write),
    LycorisLayout("doha", sets=[names | {"dora_scale"} for names in _SETS], read=decomposed(_read), write=_write),
)

ROWS = (
    RowAxes("loha", by_row="hada_w1_a hada_w2_a", common="hada_w1_b hada_w2_b"),
    RowAxes("doha", by_row="hada_w1_a hada_w2_a dora_scale", common="hada_w1_b hada_w2_b"),
)
