"""BOFT's tensors in foreign files: of the inputs in PEFT's, of the outputs in LyCORIS's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weights.adapter_file import Hyperparameter
from weights.methods.core.lycoris import LycorisLayout, Read, Tensors
from weights.methods.core.peft import PeftLayout, Settings
from weights.methods.oft import BLOCKS, read_blocks, write_blocks


def _of_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The number of factors: without a compiler for its kernel, PEFT makes one, whatever the settings say."""
    return {"factors": len(tensors["boft_R"])}


def _read(tensors: Tensors, alpha: float | None) -> Read:
    hyperparameters, found = read_blocks(tensors, alpha)
    return {**hyperparameters, "factors": found["oft_blocks"].shape[0]}, found


PEFT = PeftLayout(
    "boft",
    "BOFT",
    settings={
        "block_size": ("boft_block_size", 4),
        "blocks": ("boft_block_num", 0),
        "factors": ("boft_n_butterfly_factor", 1),
    },
    tensors={"boft_R": "boft_R", "boft_s": "boft_s"},
    biases=True,
    inert=frozenset({"boft_dropout"}),
    of_layer=_of_layer,
)

LYCORIS = LycorisLayout(
    "output-boft",
    sets=BLOCKS,
    read=_read,
    write=write_blocks,
    holds=lambda tensors: tensors["oft_blocks"].ndim == 4,
)
