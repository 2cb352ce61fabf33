"""The model card of an adapter: what it is, where it sits and how to load it."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from weights.adapter_file import AdapterFile, Hyperparameter, LayerWeights
from weights.errors import FileFormatError
from weights.hub.layer_tree import drawn
from weights.hub.path import is_repo_id

CARD = "README.md"
_LIBRARY = "fluxion-adapters"
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}
_TEXTS = frozenset({"base_model_relation", "library_name", "license_link", "license_name", "pipeline_tag"})
_TEXT_OR_LIST = frozenset({"base_model", "datasets", "language", "license", "new_version"})

_BODY = """\
# {title}

| Method | Layers | Rank | Alpha | Parameters |
|---|---|---|---|---|
{rows}

With [{library}](https://pypi.org/project/{library}/):

```python
import adapters

patch = adapters.load(model, "{source}"){hint}
```
"""

_ELSEWHERE = {
    "peft": """
With [PEFT](https://github.com/huggingface/peft):

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{source}")
```
""",
    "diffusers": """
With [diffusers](https://github.com/huggingface/diffusers):

```python
pipeline.load_lora_weights("{source}")
```
""",
}

_LAYERS = """
The layers it adapts:

```text
{tree}
```
"""


def model_card(
    adapter: AdapterFile,
    format: str,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    tags: Collection[str] = (),
) -> str:
    """The text of `README.md`: the Hub's fields as YAML, a table of methods, how to load it, and a tree of the layers.

    Example:
        >>> style = weights.read_adapter("out")
        >>> print(weights.model_card(style, "peft", repo_id="me/style-lora", license="mit"))
        ---
        ...
        license: mit
        ...

    A base model that is a local path means nothing to others and is left out.

    Args:
        adapter: What the card is about.
        format: The format of the file; those of PEFT and diffusers can be loaded there too.
        repo_id: Where it is published, for the code that loads it.
        license: The key of a license, such as `"mit"`; `"other"` needs a name and a link too.
        license_name: The name of another license.
        license_link: The address of another license, or the name of a file with it in the repository.
        tags: More tags.

    Raises:
        FileFormatError: The license has no name or link, or a tag is not a string.
    """
    from huggingface_hub import ModelCardData

    if license == "other" and not (license_name and license_link):
        raise FileFormatError('The license "other" needs license_name= and license_link= too.')
    given = [text for text in (license, license_name, license_link, *tags) if text is not None]
    if isinstance(tags, str) or not all(isinstance(text, str) and text.isprintable() for text in given):
        raise FileFormatError(f"The license and each of tags={tags!r} must be a string in one line.")
    base = adapter.base_model if adapter.base_model and is_repo_id(adapter.base_model) else None
    methods = sorted({layer.method for layer in adapter.layers.values()})
    named = [_LIBRARY, *([format] if format in _ELSEWHERE else []), *map(_plain, methods)]
    fields = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=_LIBRARY,
        license=license,
        license_name=license_name,
        license_link=license_link,
        pipeline_tag=_PIPELINES.get(adapter.task or "") or ("text-to-image" if format == "diffusers" else None),
        tags=list(dict.fromkeys([*named, *([f"base_model:adapter:{base}"] if base else []), *tags])),
    )
    source = repo_id or "<repo>"
    body = _BODY.format(
        title=f"Adapter for {base}" if base else "Adapter",
        rows="\n".join(_row(adapter, method) for method in methods),
        library=_LIBRARY,
        source=source,
        hint="" if repo_id else "  # the id of this repository, or the path of this folder",
    )
    elsewhere = _ELSEWHERE.get(format, "").format(source=source)
    tree = _LAYERS.format(tree=drawn({path: _described(layer) for path, layer in adapter.layers.items()}))
    return f"---\n{fields.to_yaml()}\n---\n\n{body}{elsewhere}{tree}"


def check_card(path: Path) -> None:
    """Check the fields of a model card, if it has any.

    Raises:
        FileFormatError: They are not sound YAML, or the Hub knows one of them as another type.
    """
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        fields: Mapping[Any, Any] | None = metadata_load(path)
        if fields is None and path.read_text(encoding="utf-8").lstrip().startswith("---"):
            raise ValueError("there is nothing in it, or the second line of --- is missing")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{path} does not begin with sound YAML between lines of ---: {reason}.") from error
    for name, value in (fields or {}).items():
        if wanted := _wanted(name, value):
            raise FileFormatError(f"{path}: the field {name} is a {type(value).__name__}; make it {wanted}.")


def _wanted(name: Any, value: Any) -> str:
    """The expected kind of value of a field; empty where the value is of that kind."""
    is_text = value is None or isinstance(value, str)
    is_list = value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    if name == "tags":
        return "" if is_list else "a list of strings"
    if name in _TEXT_OR_LIST:
        return "" if is_text or is_list else "a string or a list of strings"
    return "" if is_text or name not in _TEXTS else "a string"


def _row(adapter: AdapterFile, method: str) -> str:
    layers = [layer for layer in adapter.layers.values() if layer.method == method]
    rank, alpha = (_span(layer.hyperparameters.get(name) for layer in layers) for name in ("rank", "alpha"))
    parameters = sum(tensor.numel() for layer in layers for tensor in layer.tensors.values())
    return f"| {_plain(method)} | {len(layers)} | {rank} | {alpha} | {parameters:,} |"


def _described(layer: LayerWeights) -> str:
    rank = _span([layer.hyperparameters.get("rank")])
    return f"{_plain(layer.method)} rank {rank}" if rank else _plain(layer.method)


def _plain(method: str) -> str:
    """A method's key reduced to the letters of a word: it comes from a file."""
    return re.sub(r"[^\w.+-]", "?", method)[:40]


def _span(values: Iterable[Hyperparameter]) -> str:
    """`8`, or `4 to 16` where the layers differ."""
    numbers = sorted({v for v in values if isinstance(v, int | float) and abs(v) <= sys.float_info.max})
    return " to ".join(f"{number:g}" for number in dict.fromkeys([*numbers[:1], *numbers[-1:]]))
