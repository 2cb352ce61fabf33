"""LoRA for llama.cpp, as its `convert_lora_to_gguf.py` writes it: one GGUF file.

Tensors are named `<name>.weight.lora_a` and `.lora_b`, where the name of the layer is llama.cpp's own, and shaped as in
PEFT's files. The names that transformers gives the layers are in the `gguf` package, and the order of the outputs that
a rotary embedding turns together in `weights.families`: where llama.cpp interleaves them, so it does in B of q and k.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.errors import FileFormatError
from weights.families import architectures
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.gguf_file import EXTRA, MAGIC, GgufFile
from weights.formats.common.probe import Probe
from weights.formats.common.settings import is_number
from weights.methods.core.factors import lone_factor, shape_mismatch

NAME = "GGUF adapter"

_SUFFIX = ".gguf"
_TURNED = ("blk.{bid}.attn_q", "blk.{bid}.attn_k")
_EMBEDDING = "token_embd"
_ALPHA = "adapter.lora.alpha"
_INVOKED = "adapter.alora.invocation_tokens"
_KEY = re.compile(r"([^{]+)\.weight\.lora_([ab])")
_BLOCK = re.compile(r"\.(0|[1-9]\d{0,5})\.")
# How transformers' own models begin.
_PREFERRED = ("model.layers.{bid}.", "model.embed_tokens", "lm_head")


def recognise(probe: Probe) -> Match:
    """SURE of a GGUF file, or a folder with one; it may be a model."""
    file = probe.only(_SUFFIX)
    if file is None:
        return Match.NO
    try:
        with file.open("rb") as start:
            return Match.sure_if(start.read(len(MAGIC)) == MAGIC)
    except OSError:
        return Match.NO


def read(probe: Probe) -> AdapterFile:
    """Read a file.

    Raises:
        FileFormatError: It is not sound, not an adapter, or uses what is not supported; or the `gguf` package is
            missing.
    """
    path = probe.only(_SUFFIX) or probe.path
    try:
        import gguf  # noqa: F401 - to say at once that it is missing
    except ImportError as error:
        raise FileFormatError(f"{path} is a GGUF file, and reading it needs another package: {EXTRA}.") from error
    file = GgufFile.open(path)
    refuse(path, NAME, list(_field_problems(file.fields)))
    architecture = file.fields["general.architecture"]
    known = _paths(architecture)
    keys = {key: match for key in file.infos if (match := _KEY.fullmatch(key)) and _template(match[1]) in known}
    refuse(path, NAME, [f"the tensor {key!r} is not expected" for key in file.infos if key not in keys])
    named: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.read().items():
        named.setdefault(keys[key][1], {})[keys[key][2]] = tensor
    problems = [problem for name, tensors in named.items() if (problem := _problem(name, tensors))]
    refuse(path, NAME, problems or ([] if named else ["it has no tensors"]))
    layers: dict[str, LayerWeights] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    interleaved: set[str] = set()
    for name, tensors in named.items():
        number = _BLOCK.search(name)
        where, *others = (other.format(bid=number[1] if number else "") for other in known[_template(name)])
        layers[where] = _layer(name, tensors, file.fields.get(_ALPHA, 0.0))
        aliases[where] = tuple(others)
        if architectures()[architecture].interleaved and _template(name) in _TURNED:
            interleaved.add(where)
    metadata = {name: value for name, value in file.fields.items() if isinstance(value, str)}
    return AdapterFile(layers, metadata=metadata, aliases=aliases, interleaved=frozenset(interleaved))


def _field_problems(fields: Mapping[str, object]) -> Iterator[str]:
    if fields.get("general.type") != "adapter":
        yield f"it is of the type {fields.get('general.type', 'model')!r}, which is no adapter"
    elif fields.get("adapter.type") != "lora":
        yield f"its adapter is of the type {fields.get('adapter.type')!r}, which is not lora"
    architecture = fields.get("general.architecture")
    if architecture not in architectures():  # Of others the converter also splits, joins or turns weights.
        known = ", ".join(sorted(architectures()))
        yield f"it is for {architecture!r}, of which it is not known here how its weights were turned, only for {known}"
    if not is_number(fields.get(_ALPHA, 0.0)):
        yield f"its alpha is {fields[_ALPHA]!r}"
    if _INVOKED in fields:
        yield "it is to act from some tokens on (aLoRA), which is not supported"


# The names of layers


def _template(name: str) -> str:
    """A name with `{bid}` for the number of its block."""
    return _BLOCK.sub(".{bid}.", name, count=1)


def _paths(architecture: str) -> dict[str, list[str]]:
    """The names of the layers of an architecture by llama.cpp's names, first those in most models of transformers."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise FileFormatError(f"The installed gguf package does not know {architecture!r}: get a newer one.")
    own = architectures()[architecture].own

    def order(path: str) -> tuple[bool, bool]:
        return not path.endswith(own), not path.startswith(_PREFERRED)

    table = TensorNameMap(arch, 0)
    found: dict[str, list[str]] = {}
    for kind, paths in {**table.mappings_cfg, **table.block_mappings_cfg}.items():
        if kind in MODEL_TENSORS[arch] and paths:
            known = sorted(paths, key=order)
            without_head = [path.removeprefix("model.") for path in known]
            found[TENSOR_NAMES[kind]] = list(dict.fromkeys([*known, *without_head]))
    return found


# Layers


def _problem(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The problem of the two tensors of a layer."""
    if problem := lone_factor(
        f"{name}.weight.lora_{next(iter(tensors))}", [f"{name}.weight.lora_{end}" for end in tensors]
    ):
        return problem
    axes = (1, 1) if name == _EMBEDDING else (0, 1)
    problem = shape_mismatch(tensors["a"], tensors["b"], names=("lora_a", "lora_b"), axes=axes, flat=True)
    return f"{name!r} has {problem}" if problem else None


def _layer(name: str, tensors: Mapping[str, Tensor], alpha: float) -> LayerWeights:
    """An alpha of 0 stands for the rank."""
    rank = tensors["b"].shape[1]
    numbers = {"rank": rank, "alpha": float(alpha or rank), "dropout": 0.0, "rslora": False}
    if name == _EMBEDDING:  # Its rows are looked up, so A has one for each token.
        factors = {"lora_embedding_A": tensors["a"].T.contiguous(), "lora_embedding_B": tensors["b"]}
    else:
        factors = {"lora_A": tensors["a"], "lora_B": tensors["b"]}
    return LayerWeights("lora", numbers, factors)


# A file of any name: in a repository it might as well be a base model.
FORMAT = Format(recognise, read, suffix=_SUFFIX)
