"""Prompt tuning: trained embeddings in front of those of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError, TargetError
from adapters.layers.calls import first_tensor, with_first_tensor
from adapters.methods.core.checks import is_integer, need
from adapters.methods.core.method import Branch
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.virtual_tokens import VirtualTokens, caches, mark


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """A trained prompt for a language model of transformers: embeddings in front of those of its tokens.

    The transformer sees a longer text; its outputs for the prompt are cut off, so that logits and labels are those of
    the text. A pooled output, such as that of BERT, is of the first position: of the prompt, as in PEFT.

    Args:
        num_virtual_tokens: The number of embeddings.
        text: Ids of the initial tokens, repeated as often as need be. By default they are random tokens of the
            vocabulary.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.PromptTuning(num_virtual_tokens=8))
        >>> with adapters.use(model, patch.name): ...
        >>> patch.save_pretrained("prompt")
    """

    key = "prompt_tuning"
    paper = "arXiv:2104.08691"
    formula = "f([P, embed(tokens)]), without the first positions"

    text: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.text
        fits = isinstance(given, (tuple, list)) and all(is_integer(token, 0) for token in given)
        need(fits, self, "a text that is ids of tokens, as a tokenizer gives them", given)
        object.__setattr__(self, "text", tuple(given))

    def shape(self, transformer: nn.Module) -> tuple[int, ...]:
        embedding: Any = transformer.get_input_embeddings()  # type: ignore[operator]
        return embedding.num_embeddings, embedding.embedding_dim

    def check_spec(self, spec: WeightSpec) -> None:
        if any(token >= spec.shape[0] for token in self.text):
            raise TargetError(f"{spec.path} has no tokens beyond {spec.shape[0] - 1}: choose others for text=.")

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        tokens = torch.randint(spec.shape[0], (self.num_virtual_tokens,))
        if self.text:
            tokens = torch.tensor(self.text).repeat(self.num_virtual_tokens)[: self.num_virtual_tokens]
        embedding: Any = spec.layer.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            start = embedding(tokens.to(embedding.weight.device))
        return {"prompt_embeddings": start.to(spec.device, spec.dtype, copy=True)}

    def hyperparameters(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens}

    def begin(self, branch: Branch, layer: Callable[..., Any], scale: float, given: dict[str, Any], seen: int) -> Any:
        number, tokens = self.num_virtual_tokens, given.pop("input_ids", None)
        embeddings = given.get("inputs_embeds")
        if embeddings is None:
            embeddings = branch.layer.get_input_embeddings()(tokens)  # type: ignore[operator]
        prompt = (branch.prompt_embeddings * scale).to(embeddings).expand(len(embeddings), -1, -1)
        given["inputs_embeds"] = torch.cat([prompt, embeddings], 1)
        if (positions := given.get("position_ids")) is not None:
            # Models that number positions by their padding begin at another number.
            if positions.ndim != 2 or hasattr(getattr(branch.layer, "embeddings", None), "padding_idx"):
                raise AdapterError("PromptTuning needs position_ids of shape (batch, tokens) that begin at 0, or none.")
            first = torch.arange(seen, seen + number, device=positions.device).expand(len(positions), -1)
            given["position_ids"] = torch.cat([first, positions], 1)
        if (types := given.get("token_type_ids")) is not None:
            if not getattr(branch.layer.config, "type_vocab_size", 0):
                raise AdapterError(f"A {type(branch.layer).__name__} has no type of token for a prompt: give it none.")
            given["token_type_ids"] = torch.cat([types.new_zeros(len(types), number), types], 1)
        output = layer(**given)
        for cache in caches(given, output):
            mark(cache, branch, number)
        return _without(output, number)


def _without(output: Any, number: int) -> Any:
    """An output of a transformer without its first positions."""
    output = with_first_tensor(output, cast(Tensor, first_tensor(output))[:, number:])
    if isinstance(output, Mapping):
        if output.get("router_logits") is not None:
            raise AdapterError("PromptTuning cannot tell the router's scores of the prompt from those of the text.")
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(states[:, number:] for states in output["hidden_states"])  # type: ignore
    return output
