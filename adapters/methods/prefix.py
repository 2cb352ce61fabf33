"""Prefix tuning: trained keys and values in front of those of the text, in every layer of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.errors import AdapterError, TargetError
from adapters.methods.core.checks import is_integer, need
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.virtual_tokens import VirtualTokens, mark, tokens_of

# Settings of models whose keys or values have other heads or features than usual ones.
_OWN_SHAPES = ("num_kv_heads", "qk_rope_head_dim")


@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """A trained prefix for a language model of transformers: keys and values, as if a text had gone before.

    They are put into the cache before it begins, so the model needs attention that is full, with a cache: a sliding
    window would slide over the prefix. Attention of an encoder takes a cache as well, and gives none.

    Args:
        num_virtual_tokens: The number of keys and values in each head of each layer.
        projection: Train embeddings of the tokens and a network with this hidden size instead, whose outputs are the
            keys and values; files hold these. By default the keys and values are trained themselves.
        num_layers: The number of layers that the model has to have, as files say it; by default any.
        num_attention_heads: The number of heads of keys and values that it has to have, by default any.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.PrefixTuning(num_virtual_tokens=8))
        >>> with adapters.use(model, patch.name): ...
        >>> patch.save_pretrained("prefix")
    """

    key = "prefix_tuning"
    paper = "arXiv:2101.00190"
    formula = "softmax(Q [P, K]ᵀ) [P', V] in every layer"
    needs = VirtualTokens.needs | {"past_key_values"}

    projection: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("projection", "num_layers", "num_attention_heads"):
            value = getattr(self, name)
            need(value is None or is_integer(value, 1), self, f"a {name} of 1 or more", value)

    def shape(self, transformer: nn.Module) -> tuple[int, ...]:
        """`(layers, heads, features)` of the keys."""
        config: Any = transformer.config
        heads = config.num_attention_heads
        features = getattr(config, "head_dim", None) or config.hidden_size // heads
        return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, features

    def check_spec(self, spec: WeightSpec) -> None:
        kinds = {type(layer).__name__ for layer in _new_cache(spec.layer).layers}
        if kinds != {"DynamicLayer"}:
            raise TargetError(f"{spec.path} has no full attention in every layer, which {type(self).__name__} needs.")
        if any(hasattr(spec.layer.config, name) for name in _OWN_SHAPES):
            raise TargetError(f"{spec.path} has keys of a shape of its own, which {type(self).__name__} does not know.")
        for name, found in zip(("num_layers", "num_attention_heads"), spec.shape, strict=False):
            if getattr(self, name) not in (None, found):
                raise TargetError(f"{spec.path} has a {name} of {found}, not {getattr(self, name)}.")

    def build(self, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        layers, heads, features = spec.shape
        width, made = heads * features, 2 * layers * heads * features
        number = self.num_virtual_tokens
        where: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}
        branch = Branch()
        if self.projection is None:
            branch.register_parameter("prompt_embeddings", nn.Parameter(spec.normal(number, made)))
            return branch
        branch.register_parameter("tokens", nn.Parameter(spec.normal(number, width)))
        branch.add_module("down", fl.Linear(width, self.projection, **where))
        branch.append(fl.Tanh())
        branch.add_module("up", fl.Linear(self.projection, made, **where))
        return branch

    def begin(self, branch: Branch, layer: Callable[..., Any], scale: float, given: dict[str, Any], seen: int) -> Any:
        transformer = branch.layer
        if transformer.training and any(getattr(m, "gradient_checkpointing", False) for m in transformer.modules()):
            raise AdapterError(f"{type(self).__name__} needs the cache, which gradient checkpointing does without.")
        tokens = tokens_of(given)
        layers, heads, features = branch.matrix.shape
        prefix = _made(branch).unflatten(1, (2 * layers, heads, features)).permute(1, 2, 0, 3) * scale
        prefix = prefix.to(_computed_in(transformer, tokens.device))
        own = given.get("past_key_values") is None
        cache = given["past_key_values"] = _new_cache(transformer) if own else given["past_key_values"]
        for number, pair in enumerate(prefix.split(2)):
            cache.update(*pair.unsqueeze(1).expand(2, len(tokens), -1, -1, -1), number)
        mark(cache, branch, self.num_virtual_tokens)
        output = layer(**given)
        if cache.get_seq_length() < seen + self.num_virtual_tokens + tokens.shape[1]:
            raise AdapterError(f"A {type(transformer).__name__} makes no use of a cache: it cannot have a prefix.")
        if own and given.get("use_cache") is False and isinstance(output, Mapping):
            return type(output)(**{name: value for name, value in output.items() if value is not cache})
        return output

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        return {"prompt_embeddings": _made(branch)}

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        layers, heads, _ = branch.matrix.shape
        plain = replace(self, projection=None, num_layers=layers, num_attention_heads=heads)
        return plain, self.file_tensors(branch)


def _made(branch: Branch) -> Tensor:
    """The keys and values, of shape `(tokens, layers * 2 * heads * features)`."""
    return branch(branch.tokens) if "tokens" in branch._parameters else branch.prompt_embeddings


def _computed_in(transformer: nn.Module, device: torch.device) -> torch.dtype:
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else cast(Any, transformer).dtype


def _new_cache(transformer: nn.Module) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=cast(Any, transformer.config))
