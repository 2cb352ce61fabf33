"""LoKr's and DoKr's tensors in foreign files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights.adapter_file import Hyperparameter, LayerWeights
from weights.methods.core.lycoris import (
    LycorisLayout,
    Read,
    Tensors,
    Written,
    alpha_or_rank,
    decomposed,
    number,
    scaled,
    with_alpha,
)
from weights.methods.core.peft import RANK_AND_ALPHA_PATTERNS, PeftLayout
from weights.methods.core.rows import RowAxes
from weights.methods.loha import PEFT_INERT, PEFT_SETTINGS, in_two_positions

_TENSORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
_SETS = [first | second for first in _FIRST for second in _SECOND]


def _problem(layer: LayerWeights) -> str | None:
    """The problem of the names or the shapes of the factors."""
    if layer.tensors.keys() not in _SETS:
        return f"{', '.join(sorted(layer.tensors))}, which are not two factors"
    if "lokr_w2" in layer.tensors and layer.tensors["lokr_w2"].ndim == 3:
        return "a whole second factor of a Conv1d, for which PEFT multiplies the factors in the wrong order"
    return None


PEFT = PeftLayout(
    "lokr",
    "LOKR",
    settings={
        **PEFT_SETTINGS,
        "factor": ("decompose_factor", -1),
        "decompose_both": ("decompose_both", False),
    },
    patterns=RANK_AND_ALPHA_PATTERNS,
    tensors={name: name for name in _TENSORS},
    optional=frozenset(_TENSORS),
    inert=PEFT_INERT,
    check=_problem,
    written=in_two_positions,
)


def _read(tensors: Tensors, alpha: float | None) -> Read:
    """Of two whole factors, the alpha is of no account: it may be anything."""
    first = (tensors.get("lokr_w1_a", tensors.get("lokr_w1")), tensors.get("lokr_w1_b", tensors.get("lokr_w1")))
    thin = [tensors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    ranks = {factor.shape[0] for factor in thin} or {max(tensors["lokr_w2"].shape[:2])}
    if len(ranks) > 1:
        raise ValueError(f"factors of the ranks {', '.join(map(str, sorted(ranks)))}")
    (rank,) = ranks
    numbers: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha_or_rank(alpha if thin else None, rank),
        "factor": (first[0].shape[0], first[1].shape[1]),  # type: ignore[union-attr]
        "decompose_both": "lokr_w1_a" in tensors,
        "tucker": "lokr_t2" in tensors,
    }
    return numbers, dict(tensors)


def _write(layer: LayerWeights) -> Written:
    tensors, alpha = with_alpha(layer, "lokr_w1" if "lokr_w1" in layer.tensors else "lokr_w1_a")
    rank = number(layer, "rank")
    if alpha is not None and {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return {**tensors, "lokr_w1": scaled(tensors["lokr_w1"], alpha / rank)}, rank
    return tensors, alpha


LYCORIS = (
    LycorisLayout("lokr", sets=_SETS, read=_read, write=_write),
    LycorisLayout("dokr", sets=[names | {"dora_scale"} for names in _SETS], read=decomposed(_read), write=_write),
)


def _rows_of_block(layer: LayerWeights) -> int:
    """The rows of the second factor, where the first one has a number for each block."""
    first, second = layer.tensors["lokr_w1"], layer.tensors.get("lokr_w2", layer.tensors.get("lokr_w2_a"))
    if second is None or first.ndim != 2 or second.ndim < 2 or not second.numel():
        raise ValueError("factors that are no matrices")
    return second.shape[1 if "lokr_t2" in layer.tensors else 0]


def _of_rows(layer: LayerWeights, blocks: int) -> Mapping[str, Hyperparameter]:
    return {"factor": (blocks, layer.tensors["lokr_w1"].shape[1])}


ROWS = RowAxes(
    "lokr",
    by_row="lokr_w1",
    common="lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
    rows_of_block=_rows_of_block,
    of_rows=_of_rows,
)
