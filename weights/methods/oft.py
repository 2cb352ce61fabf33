"""Orthogonal finetuning's tensors in foreign files: PEFT's and OneTrainer's OFT, and LyCORIS's Diag-OFT."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from weights.adapter_file import Hyperparameter, LayerWeights
from weights.methods.core.lycoris import LycorisLayout, Read, Tensors, Written, number, scaled
from weights.methods.core.peft import PeftLayout, Settings

_SCALED = "oft_R.scaled_oft"


def _of_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The block size of a layer: where neither setting divides the features, PEFT takes the nearest that does."""
    blocks, elements = (next(iter(tensors.values())).shape[at] for at in (0, -1))
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    told = blocks == config["r"] or config["block_share"] if config["r"] else size == config["oft_block_size"]
    return {} if told else {"blocks": 0, "block_size": size}


def _problem(layer: LayerWeights) -> str | None:
    if layer.hyperparameters.get("of_weight"):
        return "a rotation that depends on whether it is a convolution: load it into the model, and save it from there"
    names = ", ".join(layer.tensors)
    (tensor, *others) = layer.tensors.values()
    return f"{names} of {tuple(tensor.shape)}, not one matrix" if others or tensor.ndim != 2 else None


PEFT = PeftLayout(
    "oft",
    "OFT",
    settings={
        "block_size": ("oft_block_size", 32),
        "blocks": ("r", 0),
        "coft": ("coft", False),
        "eps": ("eps", 6e-5),
        "block_share": ("block_share", False),
        "cayley_neumann": ("use_cayley_neumann", True),
        "num_terms": ("num_cayley_neumann_terms", 5),
    },
    tensors={"oft_R": "oft_R.weight", "oft_embedding_R": "oft_embedding_R.weight"},
    optional=frozenset({"oft_R", "oft_embedding_R"}),
    biases=True,
    inert=frozenset({"module_dropout"}),
    check=_problem,
    of_layer=_of_layer,
    of_file=lambda adapter: {"peft_version": "0.18.0"},  # From then on the series ends as it does here.
)


def read_blocks(tensors: Tensors, alpha: float | None) -> Read:
    """LyCORIS's rotations: the entry called alpha is the constraint."""
    return {
        "block_size": tensors["oft_blocks"].shape[-1],
        "constraint": alpha or 0.0,
        "rescale": "rescale" in tensors,
    }, dict(tensors)


def write_blocks(layer: LayerWeights) -> Written:
    """The reverse of `read_blocks`."""
    return dict(layer.tensors), number(layer, "constraint")


def _read_upper(tensors: Tensors, alpha: float | None) -> Read:
    """OneTrainer's rotations: the elements above the diagonal. A single block is for all."""
    upper = tensors["oft_R"]
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2 if upper.ndim == 2 else 0
    if not upper.numel() or not size or size * (size - 1) // 2 != upper.shape[-1]:
        raise ValueError(f"an oft_R {tuple(upper.shape)}, which is none of blocks")
    if _SCALED in tensors:
        upper = scaled(upper, 0.5 / math.sqrt(size - 1))
    return {"block_size": size, "block_share": len(upper) == 1, "of_weight": True}, {"oft_R": upper}


BLOCKS = (frozenset({"oft_blocks"}), frozenset({"oft_blocks", "rescale"}))

LYCORIS = (
    LycorisLayout(  # Blocks in three dimensions; those in four are of several rotations, of BOFT.
        "diag-oft",
        sets=BLOCKS,
        read=read_blocks,
        write=write_blocks,
        holds=lambda tensors: tensors["oft_blocks"].ndim == 3,
    ),
    LycorisLayout(
        "oft",
        sets=(frozenset({"oft_R"}), frozenset({"oft_R", _SCALED})),
        names={"oft_R": "oft_R.weight"},
        integers=frozenset({_SCALED}),
        read=_read_upper,
        write=None,
        has_alpha=False,
    ),
)
