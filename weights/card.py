"""The model card of an adapter: what it is and how to load it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from weights.adapter_file import AdapterFile, Hyperparameter
from weights.sources import is_repo_id

_LIBRARY = "fluxion-adapters"

_BODY = """\
# {title}

| Method | Layers | Rank | Alpha | Parameters |
|---|---|---|---|---|
{rows}

With [{library}](https://pypi.org/project/{library}/):

```python
import adapters

patch = adapters.load(model, "<repo>")  # the id of this repository, or the path of this folder
```
"""

_WITH_PEFT = """
With [PEFT](https://github.com/huggingface/peft):

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "<repo>")
```
"""


def model_card(adapter: AdapterFile, *, peft: bool) -> str:
    """The text of `README.md`: the Hub's fields as YAML, a table of methods, and how to load it, in PEFT too if it can.

    A base model that is a local path means nothing to others and is left out.
    """
    from huggingface_hub import ModelCardData

    base = adapter.base_model if adapter.base_model and is_repo_id(adapter.base_model) else None
    methods = sorted({layer.method for layer in adapter.layers.values()})
    fields = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=_LIBRARY,
        tags=[_LIBRARY, *(["peft"] if peft else []), *methods, *([f"base_model:adapter:{base}"] if base else [])],
    )
    body = _BODY.format(
        title=f"Adapter for {base}" if base else "Adapter",
        rows="\n".join(_row(adapter, method) for method in methods),
        library=_LIBRARY,
    )
    return f"---\n{fields.to_yaml()}\n---\n\n{body}{_WITH_PEFT if peft else ''}"


def _row(adapter: AdapterFile, method: str) -> str:
    layers = [layer for layer in adapter.layers.values() if layer.method == method]
    rank, alpha = (_span(layer.hyperparameters.get(name) for layer in layers) for name in ("rank", "alpha"))
    parameters = sum(tensor.numel() for layer in layers for tensor in layer.tensors.values())
    return f"| {method} | {len(layers)} | {rank} | {alpha} | {parameters:,} |"


def _span(values: Iterable[Hyperparameter]) -> str:
    """`8`, or `4 to 16` where the layers differ."""
    numbers = sorted({v for v in values if isinstance(v, int | float) and abs(v) <= sys.float_info.max})
    return " to ".join(f"{number:g}" for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]))
