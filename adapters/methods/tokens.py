"""Trainable tokens: a few rows of an embedding are trained, and used instead of the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.adapter import Adapter
from adapters.errors import TargetError
from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale, lerp
from adapters.methods.core.checks import need
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors

_LAYERS = (nn.Embedding, nn.Linear)


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Rows of an embedding, by default of a model's input embeddings, and with them of the head that shares its weight.

    Neither the embedding nor the head is copied: embeddings that were looked up, and scores, are replaced for these
    tokens. A layer with a forward of its own, however, runs with a weight that has the rows in it.

    Args:
        tokens: The ids of the tokens, each once.

    Raises:
        AdapterError: There are no tokens, one is named twice, or one is not an integer of 0 or more.

    Example:
        >>> patch = adapters.inject(model, adapters.TrainableTokens(tokens=(3, 7)), targets="embed")
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("tokens")
    """

    key = "trainable_tokens"
    paper = "PEFT's trainable tokens"
    formula = "W with row i replaced by E[j], for token number j, which is i"
    tied_in_files = True

    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        given = self.tokens
        need(
            isinstance(given, (tuple, list)) and len(given) > 0 and all(type(i) is int and i >= 0 for i in given),
            self,
            "tokens that are numbers of 0 or more",
            given,
        )
        need(len(set(given)) == len(given), self, "tokens that are each named once", given)
        object.__setattr__(self, "tokens", tuple(given))

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return Matrix.whole(layer, parameter) if isinstance(layer, _LAYERS) and parameter == "weight" else None

    def default_targets(self, model: nn.Module) -> Callable[[str, nn.Module], bool]:
        try:
            found = model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            raise TargetError(
                f"This {type(model).__name__} does not say which are its input embeddings: name them with targets=."
            ) from None
        while isinstance(found, Adapter):
            found = found.target
        return lambda path, module: module is found

    def check_spec(self, spec: WeightSpec) -> None:
        rows = spec.shape[0]
        if max(self.tokens) >= rows:
            raise TargetError(
                f"{spec.path} has {rows} rows, and none for the token {max(self.tokens)}: resize the embedding first."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        rows = spec.weight[list(self.tokens)]
        return {"trainable_tokens_delta": rows.to(spec.device, spec.dtype)}  # PEFT's name, though it is the row itself.

    def constants(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"tokens": torch.tensor(self.tokens, device=spec.device)}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return weight.index_copy(0, t.tokens, t.trainable_tokens_delta)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return True

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output: Tensor = layer(x, *args, **kwargs)
        rows = branch.trainable_tokens_delta.to(output.dtype)
        if isinstance(branch.layer, nn.Embedding):
            ordered, order = branch.tokens.sort()
            place = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
            looked_up = lerp(output, F.embedding(order[place], rows), scale)
            return torch.where((ordered[place] == x).unsqueeze(-1), looked_up, output)
        scores = (F.linear(x, rows) + self._fixed(branch, layer, x)).to(output.dtype)
        return output.index_copy(-1, branch.tokens, lerp(output[..., branch.tokens], scores, scale))

    @staticmethod
    def _fixed(branch: Branch, layer: Callable[..., Any], x: Tensor) -> Tensor | float:
        """The constant in the scores of these tokens: the bias of the layer, or of other adapters."""
        fixed = branch.layer.bias if layer is branch.layer else layer(x.new_zeros(x.shape[-1]))
        return 0.0 if fixed is None else cast(Tensor, fixed)[cast(Tensor, branch.tokens)]

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        return {"trainable_tokens_delta": branch.trainable_tokens_delta}
