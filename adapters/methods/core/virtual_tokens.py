"""Virtual tokens: trained vectors before the tokens of a transformer, as positions or in its cache."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.adapter import Adapter
from adapters.errors import AdapterError, TargetError
from adapters.layers.calls import first_tensor
from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale
from adapters.methods.core.checks import is_integer, need
from adapters.methods.core.method import Branch, Method

# Arguments that a transformer may have. Others could depend on the positions of the tokens.
_INPUTS = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "head_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "past_key_values",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
_MARK = "virtual_tokens"


@dataclass(frozen=True)
class VirtualTokens(Method):
    """Base of the methods that put trained tokens before those of a text, in a language model of transformers.

    The node wraps the transformer itself, inside of the model with a head, and adapts masks and positions. So losses,
    labels and `generate` are those of the model, whichever head it has.

    Files name no layer: such an adapter is loaded at its default target. Its scale multiplies its tokens; at 0 they are
    left out.
    """

    mergeable = False
    whole_model = "language models of transformers"
    needs: ClassVar[frozenset[str]] = frozenset({"input_ids", "inputs_embeds", "attention_mask"})

    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        number = self.num_virtual_tokens
        need(is_integer(number, 1), self, "a num_virtual_tokens of 1 or more", number)

    # Where it applies

    @abstractmethod
    def shape(self, transformer: nn.Module) -> tuple[int, ...]:
        """The sizes of a transformer that the tensors depend on."""

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        if parameter != "weight" or not (hasattr(layer, "config") and hasattr(layer, "get_input_embeddings")):
            return None
        return None if self._problem(layer) else Matrix(self.shape(layer), "as is", "any")

    def default_targets(self, model: nn.Module) -> Callable[[str, nn.Module], bool]:
        root, model = model, _only_transformer(model)
        base = transformer = _inside(getattr(model, "base_model", model))
        problem = _unusual(getattr(model, "config", None))
        if problem is None and base is root:
            problem = "has no transformer below it: use a model with a head, or put it inside a module"
        if problem is None:
            # A model with a head may call the decoder of its base rather than the base.
            transformer = _inside(base.get_decoder())
            problem = self._problem(transformer)
        if problem:
            raise TargetError(f"A {type(model).__name__} cannot have {type(self).__name__}: it {problem}.")
        return lambda path, module: module is transformer

    def _problem(self, transformer: nn.Module) -> str | None:
        """The reason why a transformer cannot have virtual tokens, or None."""
        if problem := _unusual(getattr(transformer, "config", None)):
            return problem
        if getattr(transformer, "base_model", None) is not transformer:
            return "has a head: adapt the transformer inside of it"
        parameters = inspect.signature(transformer.forward).parameters.values()
        names = {parameter.name for parameter in parameters if parameter.kind != inspect.Parameter.VAR_KEYWORD}
        if missing := sorted(self.needs - names):
            return f"takes no {' and no '.join(missing)}"
        if extra := sorted(names - _INPUTS):
            return f"takes {' and '.join(extra)}, which may depend on where the tokens are"
        return None

    # Its formula

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        given = _by_name(branch.layer, args, kwargs)
        self._check(given)
        cache, mask, name = given.get("past_key_values"), given.get("attention_mask"), branch.switch.name
        held = getattr(cache, _MARK, {})
        seen = 0 if cache is None else int(cache.get_seq_length())
        if name not in held and seen != sum(held.values()):
            raise AdapterError(f"The cache was filled without the tokens of {name!r}: begin with an empty one.")
        if mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.num_virtual_tokens), mask], 1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.num_virtual_tokens
        if name not in held:
            return self.begin(branch, layer, cast(float, scale), given, seen)
        if mask is not None and given["attention_mask"].shape[1] > seen + tokens_of(given).shape[1]:
            raise AdapterError(
                f"The mask is for more tokens than there are besides those of {name!r} in the cache: hand over every"
                " token that the cache does not hold."
            )
        return layer(**given)

    def _check(self, given: Mapping[str, Any]) -> None:
        """Refuse a cache that does not grow, and rows that hold more than one text."""
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if getattr(cache, "is_compileable", False):
            raise AdapterError(f"{type(self).__name__} needs a cache that grows, not a {type(cache).__name__}.")
        if mask is not None and (isinstance(mask, Mapping) or mask.ndim != 2):
            raise AdapterError(f"{type(self).__name__} needs an attention_mask of shape (batch, tokens), or none.")
        if _is_packed(given):
            raise AdapterError(f"{type(self).__name__} needs rows of one text each: several have no one beginning.")

    @abstractmethod
    def begin(self, branch: Branch, layer: Callable[..., Any], scale: float, given: dict[str, Any], seen: int) -> Any:
        """The output for the beginning of a text.

        Args:
            branch: The branch.
            layer: The transformer.
            scale: Multiplies the tokens.
            given: Its inputs by name, with a mask that is wide enough and positions that leave room already.
            seen: The number of virtual tokens of other patches in the cache.
        """


def tokens_of(given: Mapping[str, Any]) -> Tensor:
    """The tokens or their embeddings."""
    return cast(Tensor, first_tensor([given.get("input_ids"), given.get("inputs_embeds")]))


def mark(cache: Any, branch: Branch, number: int) -> None:
    """Mark a cache, and copies of it, as holding the tokens of a branch."""
    setattr(cache, _MARK, {**getattr(cache, _MARK, {}), branch.switch.name: number})


def caches(*values: Any) -> list[Any]:
    """The caches among the inputs and outputs of a transformer."""
    parts = (part for value in values for part in (value.values() if isinstance(value, Mapping) else value))
    return [part for part in parts if hasattr(part, "get_seq_length")]


def _only_transformer(model: nn.Module) -> nn.Module:
    """The model of transformers in a module, if it is the only one, else the module itself."""
    if _is_transformer(model):
        return model
    found = [_inside(module) for module, _ in fl.walk(model, lambda module, _: _is_transformer(module))]
    return cast(nn.Module, found[0]) if len(found) == 1 else model


def _is_transformer(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "get_text_config")


def _inside(module: Any) -> Any:
    """A module without an adapter around it."""
    return module.target if isinstance(module, Adapter) else module


def _unusual(config: Any) -> str | None:
    """The reason why a model of this configuration is unsupported, or None."""
    if not hasattr(config, "get_text_config"):
        return "is not a model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder and a decoder, with a text for each"
    return "takes more than text" if config.get_text_config() is not config else None


def _by_name(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(transformer.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_packed(given: Mapping[str, Any]) -> bool:
    """Whether a row holds several texts, one after the other."""
    positions = given.get("position_ids")
    if any(name.startswith("cu_seq_lens") and value is not None for name, value in given.items()):
        return True
    if positions is None or given.get("attention_mask") is not None:
        return False
    return bool((positions.diff(dim=-1) != 1).any())
