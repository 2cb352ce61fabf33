"""HiRA's tensors in foreign files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weights.adapter_file import Hyperparameter
from weights.methods.core.peft import PeftLayout, Settings
from weights.methods.core.rows import RowAxes

_TENSORS = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")


def _of_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The rank of the tensors, as PEFT may have heeded a pattern or not."""
    factors = [tensor for name, tensor in tensors.items() if name.endswith("_A")]
    return {"rank": len(factors[0])} if factors else {}


PEFT = PeftLayout(
    "hira",
    "HIRA",
    settings={"rank": ("r", 32)},
    tensors={name: name for name in _TENSORS},
    optional=frozenset(_TENSORS),
    inert=frozenset({"hira_dropout", "rank_pattern"}),  # PEFT heeds the pattern for second adapters only.
    of_layer=_of_layer,
)

ROWS = RowAxes("hira", by_row="hira_B", common="hira_A")
