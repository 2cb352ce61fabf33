"""LoRA for llama.cpp, as its `convert_lora_to_gguf.py` writes it: one GGUF file.

Tensors are named `<name>.weight.lora_a` and `.lora_b`, where the name of the layer is llama.cpp's own, and shaped as in
PEFT's files. What transformers calls the layers is in the `gguf` package. For some architectures llama.cpp has both
outputs that a rotary embedding turns together side by side; there, so have B of q and k.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.errors import FileFormatError
from weights.formats.found import Found, is_number
from weights.formats.gguf_file import EXTRA, MAGIC, GgufFile
from weights.formats.keyed import refuse

FILES = ()  # A file of any name: in a repository it might as well be a base model.
NAME = "GGUF adapter"

# Of other architectures the converter also splits, joins or turns weights, which is not undone here.
_SIDE_BY_SIDE = frozenset({"arcee", "deci", "granite", "llama", "minicpm", "nanbeige", "olmo", "smollm3"})
_AS_THEY_ARE = frozenset(
    {"gemma", "gemma2", "gemma3", "olmo2", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "starcoder2"}
)
_TURNED = ("blk.{bid}.attn_q", "blk.{bid}.attn_k")
_EMBEDDING = "token_embd"
_ALPHA = "adapter.lora.alpha"
_INVOKED = "adapter.alora.invocation_tokens"
_KEY = re.compile(r"([^{]+)\.weight\.lora_([ab])")
_BLOCK = re.compile(r"\.(0|[1-9]\d{0,5})\.")
# How transformers' own models begin.
_PREFERRED = ("model.layers.{bid}.", "model.embed_tokens", "lm_head")
# What a few of them call layers for which most have other names.
_OWN = {
    "phi3": (".qkv_proj", ".gate_up_proj"),
    "qwen2moe": (".mlp.gate",),
    "qwen3moe": (".mlp.gate",),
    "starcoder2": (".mlp.c_fc", ".mlp.c_proj"),
}


def recognise(found: Found) -> bool:
    """Whether it is a GGUF file, or a folder with one; it may be a model."""
    file = _file(found)
    if file is None:
        return False
    try:
        with file.open("rb") as start:
            return start.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(found: Found) -> AdapterFile:
    """Read a file.

    Raises:
        FileFormatError: It is not sound, not an adapter, or uses what is not supported; or the `gguf` package is
            missing.
    """
    path = _file(found) or found.path
    try:
        import gguf  # noqa: F401 - to say at once that it is missing
    except ImportError as error:
        raise FileFormatError(f"{path} is a GGUF file, and reading it needs another package: {EXTRA}.") from error
    file = GgufFile.open(path)
    refuse(path, NAME, list(_field_problems(file.fields)))
    architecture = file.fields["general.architecture"]
    known = _paths(architecture)
    keys = {key: match for key in file.slots if (match := _KEY.fullmatch(key)) and _template(match[1]) in known}
    refuse(path, NAME, [f"the tensor {key!r} is not expected" for key in file.slots if key not in keys])
    named: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.read().items():
        named.setdefault(keys[key][1], {})[keys[key][2]] = tensor
    problems = [f"{name!r} has {what}" for name, tensors in named.items() if (what := _problem(name, tensors))]
    refuse(path, NAME, problems or ([] if named else ["it has no tensors"]))
    layers: dict[str, LayerWeights] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    interleaved: set[str] = set()
    for name, tensors in named.items():
        number = _BLOCK.search(name)
        where, *others = (other.format(bid=number[1] if number else "") for other in known[_template(name)])
        layers[where] = _layer(name, tensors, file.fields.get(_ALPHA, 0.0))
        aliases[where] = tuple(others)
        if architecture in _SIDE_BY_SIDE and _template(name) in _TURNED:
            interleaved.add(where)
    metadata = {name: value for name, value in file.fields.items() if isinstance(value, str)}
    return AdapterFile(layers, metadata=metadata, aliases=aliases, interleaved=frozenset(interleaved))


def _file(found: Found) -> Path | None:
    """The GGUF file that is meant: the path itself, or the only one in the folder."""
    files = [found.path] if found.path.is_file() else sorted(found.path.glob("*.gguf"))
    return files[0] if len(files) == 1 and files[0].suffix == ".gguf" else None


def _field_problems(fields: Mapping[str, object]) -> Iterator[str]:
    if fields.get("general.type") != "adapter":
        yield f"it is of the type {fields.get('general.type', 'model')!r}, which is no adapter"
    elif fields.get("adapter.type") != "lora":
        yield f"its adapter is of the type {fields.get('adapter.type')!r}, which is not lora"
    architecture = fields.get("general.architecture")
    if architecture not in _SIDE_BY_SIDE | _AS_THEY_ARE:
        known = ", ".join(sorted(_SIDE_BY_SIDE | _AS_THEY_ARE))
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
    """What the layers of an architecture are called, by llama.cpp's names, first as in most models of transformers."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise FileFormatError(f"The installed gguf package does not know {architecture!r}: get a newer one.")
    own = _OWN.get(architecture, ())

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
    """What is wrong with the two tensors of a layer."""
    if tensors.keys() != {"a", "b"}:
        return f"only lora_{next(iter(tensors))}"
    a, b = (tuple(tensors[end].shape) for end in "ab")
    if len(a) != 2 or len(b) != 2 or (a[1] if name == _EMBEDDING else a[0]) != b[1]:
        return f"a lora_a of {a} and a lora_b of {b}, which do not fit each other"
    return None


def _layer(name: str, tensors: Mapping[str, Tensor], alpha: float) -> LayerWeights:
    """An alpha of 0 stands for the rank."""
    rank = tensors["b"].shape[1]
    numbers = {"rank": rank, "alpha": float(alpha or rank), "dropout": 0.0, "rslora": False}
    if name == _EMBEDDING:  # Its rows are looked up, so A has one for each token.
        factors = {"lora_embedding_A": tensors["a"].T.contiguous(), "lora_embedding_B": tensors["b"]}
    else:
        factors = {"lora_A": tensors["a"], "lora_B": tensors["b"]}
    return LayerWeights("lora", numbers, factors)
