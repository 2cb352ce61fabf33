"""The bytes: tensors in safetensors files and on the Hugging Face Hub, and the file grammars of adapters."""

from weights.adapter_file import AdapterFile, LayerWeights
from weights.adapter_io import formats_of, read_adapter, write_adapter
from weights.errors import (
    FileFormatError,
    FileWriteError,
    HubAccessError,
    HubConflictError,
    HubConnectionError,
    HubError,
    SourceNotFoundError,
    WeightsError,
)
from weights.hub.card import model_card
from weights.hub.download import download
from weights.hub.publish import publish
from weights.tensors.open import TensorFiles, open_parts, save
from weights.tensors.open import open_tensors as open  # noqa: A004
from weights.tensors.rewrite import rewrite

__all__ = [
    "AdapterFile",
    "FileFormatError",
    "FileWriteError",
    "HubAccessError",
    "HubConflictError",
    "HubConnectionError",
    "HubError",
    "LayerWeights",
    "SourceNotFoundError",
    "TensorFiles",
    "WeightsError",
    "download",
    "formats_of",
    "model_card",
    "open",
    "open_parts",
    "publish",
    "read_adapter",
    "rewrite",
    "save",
    "write_adapter",
]
