"""The rows of an adapted layer, which make one output each: some of them, as an adapter of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from weights.adapter_file import Hyperparameter, LayerWeights


@dataclass(frozen=True)
class _Rows:
    """Which tensors of a method have a row for each output of the layer, and which are for all outputs."""

    by_row: frozenset[str]
    common: frozenset[str] = frozenset()


def _rows(by_row: str, common: str = "") -> _Rows:
    return _Rows(frozenset(by_row.split()), frozenset(common.split()))


_OWN_ROWS: Mapping[str, _Rows] = {
    "lora": _rows("lora_B lora_B.bias", "lora_A"),
    "dora": _rows("lora_B lora_magnitude_vector", "lora_A"),
    "hira": _rows("hira_B", "hira_A"),
    "loha": _rows("hada_w1_a hada_w2_a", "hada_w1_b hada_w2_b"),
    "doha": _rows("hada_w1_a hada_w2_a dora_scale", "hada_w1_b hada_w2_b"),
    "lokr": _rows("lokr_w1", "lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"),
    "lycoris-glora": _rows("b1", "a1 a2 b2"),
    "full": _rows("diff"),
    "copy": _rows("weight bias"),
}
"""The tensors of each method whose rows can be told apart: the first axis of the former has the rows."""


def split_rows(layer: LayerWeights, sizes: Sequence[int]) -> list[LayerWeights]:
    """Cut a layer into parts that have so many rows each.

    Of a LoRA whose parts were trained apart, each gets its own ranks back: those outside of which its rows of B are 0.

    Raises:
        ValueError: The layer has another number of rows, or its method does not allow it; the message says what is
            wrong.
    """
    ends = list(accumulate(sizes))
    rows = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [_of_own_rank(take_rows(layer, [part], ends[-1]), len(sizes)) for part in rows]


def take_rows(layer: LayerWeights, rows: Sequence[range], of: int) -> LayerWeights:
    """Some rows of a layer, in an order of their own, out of so many.

    Raises:
        ValueError: The layer has another number of rows, or its method does not allow it; the message says what is
            wrong.
    """
    tensors, hyperparameters = layer.tensors, dict(layer.hyperparameters)
    own = _OWN_ROWS.get(layer.method, _Rows(frozenset()))
    by_row = own.by_row & tensors.keys()
    # A start that is made from the weight is another one for each part.
    if not by_row or tensors.keys() - own.by_row - own.common or _is_of_all_rows(hyperparameters):
        raise ValueError(f"{layer.method} with {', '.join(sorted(tensors))}, whose rows cannot be told apart")
    size = _rows_of_block(layer)
    for name in by_row:
        if tensors[name].ndim < 1 or len(tensors[name]) * size != of:
            raise ValueError(f"a {name} {tuple(tensors[name].shape)}, not of {of} rows")
    if any(end % size for part in rows for end in (part.start, part.stop)):
        raise ValueError(f"{layer.method} in blocks of {size} rows, which do not end where the parts do")
    if layer.method == "lokr":
        hyperparameters["factor"] = (sum(map(len, rows)) // size, tensors["lokr_w1"].shape[1])
    taken = {
        name: torch.cat([tensor[part.start // size : part.stop // size] for part in rows])
        if name in by_row
        else tensor.clone()
        for name, tensor in tensors.items()
    }
    return LayerWeights(layer.method, hyperparameters, taken)


def _is_of_all_rows(hyperparameters: Mapping[str, Hyperparameter]) -> bool:
    """Whether what becomes of one row depends on the others: by a start, or by lengths of inputs."""
    return "init" in hyperparameters or bool(hyperparameters.get("on_inputs"))


def _rows_of_block(layer: LayerWeights) -> int:
    """How many rows belong together: those of the second factor, where the first one has a number for each block."""
    if layer.method != "lokr":
        return 1
    first, second = layer.tensors["lokr_w1"], layer.tensors.get("lokr_w2", layer.tensors.get("lokr_w2_a"))
    if second is None or first.ndim != 2 or second.ndim < 2 or not second.numel():
        raise ValueError("factors that are no matrices")
    return second.shape[1 if "lokr_t2" in layer.tensors else 0]


def _of_own_rank(layer: LayerWeights, parts: int) -> LayerWeights:
    """One of several parts of a layer, without the ranks of the others if each has its own."""
    a, b = layer.tensors.get("lora_A"), layer.tensors.get("lora_B")
    rank, alpha = layer.hyperparameters.get("rank"), layer.hyperparameters.get("alpha")
    if a is None or b is None or not isinstance(rank, int) or not isinstance(alpha, int | float):
        return layer
    if parts < 2 or b.ndim < 2 or not len(a) == b.shape[1] == rank or rank % parts:
        return layer
    own = rank // parts
    used = [block for block, columns in enumerate(b.split(own, 1)) if columns.bool().any()]
    if len(used) != 1:
        return layer
    ranks = slice(used[0] * own, (used[0] + 1) * own)
    fewer = math.sqrt(parts) if layer.hyperparameters.get("rslora") else parts
    hyperparameters: dict[str, Hyperparameter] = {**layer.hyperparameters, "rank": own, "alpha": alpha / fewer}
    tensors: dict[str, Tensor] = {**layer.tensors, "lora_A": a[ranks].clone(), "lora_B": b[:, ranks].clone()}
    return LayerWeights(layer.method, hyperparameters, tensors)
