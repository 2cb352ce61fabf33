"""How LyCORIS writes each method: the ends of the tensors' names, and what the tensors say of its numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weights.adapter_file import Hyperparameter, LayerWeights

Tensors = Mapping[str, Tensor]
Read = tuple[dict[str, Hyperparameter], dict[str, Tensor]]
Written = tuple[dict[str, Tensor], float | None]

# A core and a factor make a tensor of the product of their sizes, which must not be out of proportion to the file.
_LARGEST_KERNEL = 4096


@dataclass(frozen=True)
class Grammar:
    """One method in the files of LyCORIS.

    Attributes:
        method: The key of the method.
        sets: The tensors that a layer may have together.
        read: The hyperparameters and the tensors, from the tensors of a file and its alpha, or None where it has none.
            Raises a ValueError that says what does not fit.
        write: The reverse. Raises a ValueError that says what the format has no place for.
        names: For a tensor whose name in the file is another, the end of that.
        bias: For a tensor, the end of the name of the one that does the same to the bias of the layer.
        has_alpha: Whether a layer may have an alpha.
        holds: Whether it is for these tensors, of all that have their names.
    """

    method: str
    sets: Collection[frozenset[str]]
    read: Callable[[Tensors, float | None], Read]
    write: Callable[[LayerWeights], Written]
    names: Mapping[str, str] = field(default_factory=dict)
    bias: Mapping[str, str] = field(default_factory=dict)
    has_alpha: bool = True
    holds: Callable[[Tensors], bool] = lambda tensors: True

    @property
    def ends(self) -> dict[str, str]:
        """The name of a tensor by the end of its name in a file."""
        return {self.end(name): name for names in self.sets for name in names}

    def end(self, name: str) -> str:
        """How the name of a tensor ends in a file."""
        return self.names.get(name, name)

    def fits(self, tensors: Tensors) -> bool:
        """Whether a layer of these tensors is one of this grammar."""
        return frozenset(tensors) in self.sets and self.holds(tensors)

    def check(self, tensors: Tensors) -> None:
        """Raise a ValueError for what is no tensor of any method."""
        for name, tensor in tensors.items():
            least = 1 if name in ("lora_magnitude_vector", "lora_B.bias") else 2
            if self.has_alpha and (tensor.ndim < least or not tensor.numel()):
                raise ValueError(f"a tensor that is no matrix, {self.end(name)} of shape {tuple(tensor.shape)}")
            if not tensor.is_floating_point() and name not in ("on_input", _SCALED):
                raise ValueError(f"a {self.end(name)} of {str(tensor.dtype).removeprefix('torch.')}")


def _alpha(alpha: float | None, rank: int) -> float:
    """That of a file: none and 0 both stand for the rank, in LyCORIS as in kohya's scripts."""
    return alpha or float(rank)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """A multiple, not rounded to half precision."""
    return tensor if scale == 1 else _widened(tensor) * scale


def _widened(tensor: Tensor) -> Tensor:
    """A tensor in at least single precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _with_alpha(layer: LayerWeights, factor: str) -> Written:
    """The tensors and the alpha of a layer, of which one tensor takes in what an alpha of 0 cannot say."""
    rank, alpha = _number(layer, "rank"), _number(layer, "alpha")
    if alpha:
        return dict(layer.tensors), alpha
    return {**layer.tensors, factor: _scaled(layer.tensors[factor], 0.0)}, rank


def _number(layer: LayerWeights, name: str) -> float:
    value = layer.hyperparameters.get(name)
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"no {name} that is a finite number")
    return value


def _read_lora(tensors: Tensors, alpha: float | None) -> Read:
    down, up = tensors["lora_A"], tensors["lora_B"]
    core = tensors.get("lora_mid")
    rank = down.shape[0]
    if core is not None:
        if core.shape[:2] != (rank, rank) or math.prod(core.shape[2:]) > _LARGEST_KERNEL:
            raise ValueError(f"a lora_mid {tuple(core.shape)} that does not fit rank {rank}")
        # Each position of the kernel has its own mixture of the rows of A: as if A had been a convolution.
        down = torch.einsum("pq...,qc->pc...", _widened(core), _widened(down.flatten(1)))
    return {"rank": rank, "alpha": _alpha(alpha, rank)}, {"lora_A": down, "lora_B": up}


def _write_lora(layer: LayerWeights) -> Written:
    rank, (a, b) = layer.hyperparameters.get("rank"), (layer.tensors["lora_A"].shape, layer.tensors["lora_B"].shape)
    if a[0] != rank or b[1] != rank or not set(b[2:]) <= {1}:
        raise ValueError(f"lora_A {tuple(a)} and lora_B {tuple(b)}, which are no matrices of rank {rank}")
    tensors, alpha = _with_alpha(layer, "lora_B")
    # There is no word for rsLoRA: the alpha of plain LoRA says the same.
    return tensors, alpha * math.sqrt(_number(layer, "rank")) if alpha and layer.hyperparameters.get(
        "rslora"
    ) else alpha


def _read_biased(tensors: Tensors, alpha: float | None) -> Read:
    hyperparameters, factors = _read_lora(tensors, alpha)
    return {**hyperparameters, "bias": True}, {**factors, "lora_B.bias": tensors["lora_B.bias"]}


def _read_dora(tensors: Tensors, alpha: float | None) -> Read:
    hyperparameters, factors = _read_lora(tensors, alpha)
    lengths = tensors["lora_magnitude_vector"]
    hyperparameters |= _side(lengths)
    shaped = lengths.flatten() if factors["lora_A"].ndim == 2 else _shaped(lengths, factors["lora_A"], axis=1)
    return hyperparameters, {**factors, "lora_magnitude_vector": shaped}


def _decomposed(read: Callable[[Tensors, float | None], Read]) -> Callable[[Tensors, float | None], Read]:
    """For a method whose weight is decomposed."""

    def read_decomposed(tensors: Tensors, alpha: float | None) -> Read:
        hyperparameters, found = read(tensors, alpha)
        return {**hyperparameters, **_side(tensors["dora_scale"])}, found

    return read_decomposed


def _side(lengths: Tensor) -> dict[str, Hyperparameter]:
    """Whether lengths are those of the columns of a weight: then they are in the second dimension."""
    if lengths.numel() == lengths.shape[0]:
        return {}
    if lengths.ndim < 2 or lengths.numel() != lengths.shape[1]:
        raise ValueError(f"a dora_scale {tuple(lengths.shape)}, neither for the outputs nor for the inputs")
    return {"on_inputs": True}


def _write_dora(layer: LayerWeights) -> Written:
    tensors, alpha = _write_lora(layer)
    axis = int(bool(layer.hyperparameters.get("on_inputs")))
    lengths = _shaped(layer.tensors["lora_magnitude_vector"], layer.tensors["lora_A"], axis)
    return {**tensors, "lora_magnitude_vector": lengths}, alpha


def _shaped(lengths: Tensor, like: Tensor, axis: int) -> Tensor:
    """Lengths in one dimension of as many as a weight has, the others of size 1."""
    return lengths.reshape([-1 if dimension == axis else 1 for dimension in range(like.ndim)])


def _read_loha(tensors: Tensors, alpha: float | None) -> Read:
    rank = tensors["hada_w1_b"].shape[0]
    return {"rank": rank, "alpha": _alpha(alpha, rank), "tucker": "hada_t1" in tensors}, dict(tensors)


def _write_loha(layer: LayerWeights) -> Written:
    return _with_alpha(layer, "hada_w1_a")


def _read_lokr(tensors: Tensors, alpha: float | None) -> Read:
    """Of two whole factors, the alpha is of no account: it may be anything."""
    first = (tensors.get("lokr_w1_a", tensors.get("lokr_w1")), tensors.get("lokr_w1_b", tensors.get("lokr_w1")))
    decomposed = [tensors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    ranks = {factor.shape[0] for factor in decomposed} or {max(tensors["lokr_w2"].shape[:2])}
    if len(ranks) > 1:
        raise ValueError(f"factors of the ranks {', '.join(map(str, sorted(ranks)))}")
    (rank,) = ranks
    numbers: dict[str, Any] = {
        "rank": rank,
        "alpha": _alpha(alpha if decomposed else None, rank),
        "factor": (first[0].shape[0], first[1].shape[1]),  # type: ignore[union-attr]
        "decompose_both": "lokr_w1_a" in tensors,
        "tucker": "lokr_t2" in tensors,
    }
    return numbers, dict(tensors)


def _write_lokr(layer: LayerWeights) -> Written:
    tensors, alpha = _with_alpha(layer, "lokr_w1" if "lokr_w1" in layer.tensors else "lokr_w1_a")
    rank = _number(layer, "rank")
    if alpha is not None and {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return {**tensors, "lokr_w1": _scaled(tensors["lokr_w1"], alpha / rank)}, rank
    return tensors, alpha


def _read_glora(tensors: Tensors, alpha: float | None) -> Read:
    rank = tensors["a2"].shape[0]
    return {"rank": rank, "alpha": _alpha(alpha, rank)}, dict(tensors)


def _write_glora(layer: LayerWeights) -> Written:
    if _number(layer, "alpha") == 0:
        raise ValueError("an alpha of 0, which would stand for the rank")
    return dict(layer.tensors), _number(layer, "alpha")


def _read_rotation(tensors: Tensors, alpha: float | None) -> Read:
    """What is called alpha is the constraint; blocks in three dimensions, or in four those of several rotations."""
    return {
        "block_size": tensors["oft_blocks"].shape[-1],
        "constraint": alpha or 0.0,
        "rescale": "rescale" in tensors,
    }, dict(tensors)


def _read_butterfly(tensors: Tensors, alpha: float | None) -> Read:
    hyperparameters, tensors = _read_rotation(tensors, alpha)
    return {**hyperparameters, "factors": tensors["oft_blocks"].shape[0]}, tensors


def _write_rotation(layer: LayerWeights) -> Written:
    return dict(layer.tensors), _number(layer, "constraint")


def _read_input_rotation(tensors: Tensors, alpha: float | None) -> Read:
    """OneTrainer's, which has the elements above the diagonal. One block is for all."""
    upper = tensors["oft_R"]
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2 if upper.ndim == 2 else 0
    if not upper.numel() or not size or size * (size - 1) // 2 != upper.shape[-1]:
        raise ValueError(f"an oft_R {tuple(upper.shape)}, which is none of blocks")
    if _SCALED in tensors:
        upper = _scaled(upper, 0.5 / math.sqrt(size - 1))
    return {"block_size": size, "block_share": len(upper) == 1, "of_weight": True}, {"oft_R": upper}


def _read_full(tensors: Tensors, alpha: float | None) -> Read:
    return {}, dict(tensors)


def _write_full(layer: LayerWeights) -> Written:
    return dict(layer.tensors), None


def _read_ia3(tensors: Tensors, alpha: float | None) -> Read:
    """Files hold what is added to a factor of 1, and the bias of a layer is not multiplied."""
    on_input = bool(tensors.get("on_input", torch.tensor(0)).any())
    factors = 1 + _widened(tensors["ia3_l"])
    if factors.ndim == 1:
        factors = factors.view(1, -1) if on_input else factors.view(-1, 1)
    return {"feedforward": True} if on_input else {"feedforward": False, "bias": False}, {"ia3_l": factors}


def write_none(layer: LayerWeights) -> Written:
    """For what only other programs write, into files of which the rest is as LyCORIS' are."""
    raise ValueError(f"{', '.join(sorted(layer.tensors))}, which LyCORIS does not read")


def _write_ia3(layer: LayerWeights) -> Written:
    on_input = bool(layer.hyperparameters.get("feedforward"))
    if not on_input and layer.hyperparameters.get("bias", True):
        raise ValueError("factors of the outputs and of the bias, which LyCORIS leaves as it is: train with bias=False")
    factors = layer.tensors["ia3_l"]
    added = _widened(factors) - 1
    return {"ia3_l": added.flatten() if added.ndim == 2 else added, "on_input": torch.tensor(int(on_input))}, None


_LORA = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_B.bias": "lora_up.bias",
}
_SCALE = {"dora_scale"}
_SCALED = "oft_R.scaled_oft"
_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_HADA_SETS = (_HADA, _HADA | {"hada_t1", "hada_t2"})
_KRON_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_KRON_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
_KRON_SETS = [first | second for first in _KRON_FIRST for second in _KRON_SECOND]
_ROTATION = (frozenset({"oft_blocks"}), frozenset({"oft_blocks", "rescale"}))

GRAMMARS: tuple[Grammar, ...] = (
    Grammar(
        "lora",
        sets=(frozenset({"lora_A", "lora_B"}), frozenset({"lora_A", "lora_B", "lora_mid"})),
        names=_LORA,
        read=_read_lora,
        write=_write_lora,
    ),
    Grammar(
        "dora",
        sets=(frozenset({"lora_A", "lora_B", "lora_magnitude_vector"}), frozenset(_LORA) - {"lora_B.bias"}),
        names=_LORA,
        read=_read_dora,
        write=_write_dora,
    ),
    Grammar(
        "lora",
        sets=(frozenset({"lora_A", "lora_B", "lora_B.bias"}),),
        names=_LORA,
        read=_read_biased,
        write=write_none,
    ),
    Grammar("loha", sets=_HADA_SETS, read=_read_loha, write=_write_loha),
    Grammar("doha", sets=[names | _SCALE for names in _HADA_SETS], read=_decomposed(_read_loha), write=_write_loha),
    Grammar("lokr", sets=_KRON_SETS, read=_read_lokr, write=_write_lokr),
    Grammar("dokr", sets=[names | _SCALE for names in _KRON_SETS], read=_decomposed(_read_lokr), write=_write_lokr),
    Grammar(
        "lycoris-glora",
        sets=(frozenset({"a1", "a2", "b1", "b2"}),),
        names={name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")},
        read=_read_glora,
        write=_write_glora,
    ),
    Grammar(
        "diag-oft",
        sets=_ROTATION,
        read=_read_rotation,
        write=_write_rotation,
        holds=lambda tensors: tensors["oft_blocks"].ndim == 3,
    ),
    Grammar(
        "output-boft",
        sets=_ROTATION,
        read=_read_butterfly,
        write=_write_rotation,
        holds=lambda tensors: tensors["oft_blocks"].ndim == 4,
    ),
    Grammar(
        "full",
        sets=(frozenset({"diff"}),),
        bias={"diff": "diff_b"},
        read=_read_full,
        write=_write_full,
        has_alpha=False,
        holds=lambda tensors: tensors["diff"].ndim > 1,
    ),
    Grammar(  # Of normalisation layers.
        "full",
        sets=(frozenset({"diff"}),),
        names={"diff": "w_norm"},
        bias={"diff": "b_norm"},
        read=_read_full,
        write=_write_full,
        has_alpha=False,
        holds=lambda tensors: tensors["diff"].ndim == 1,
    ),
    Grammar(
        "ia3",
        sets=(frozenset({"ia3_l"}), frozenset({"ia3_l", "on_input"})),
        names={"ia3_l": "weight"},
        read=_read_ia3,
        write=_write_ia3,
        has_alpha=False,
    ),
    Grammar(  # Of ComfyUI: the weight itself.
        "copy",
        sets=(frozenset({"weight"}),),
        names={"weight": "set_weight"},
        read=_read_full,
        write=write_none,
        has_alpha=False,
    ),
    Grammar(  # Of OneTrainer.
        "oft",
        sets=(frozenset({"oft_R"}), frozenset({"oft_R", _SCALED})),
        names={"oft_R": "oft_R.weight"},
        read=_read_input_rotation,
        write=write_none,
        has_alpha=False,
    ),
)
"""Every method that LyCORIS's files can hold."""
