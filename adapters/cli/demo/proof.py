"""Proof that ejecting restores a model: its objects, bytes, names and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """State of a model at one moment: its objects, their bytes and names, and its outputs."""

    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    trainable: list[bool]
    state: Mapping[str, Tensor]
    outputs: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, images: Tensor) -> Snapshot:
        """Snapshot of a model, with its outputs for some images."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls(
            modules=dict(model.named_modules(remove_duplicate=False)),
            parameters=parameters,
            trainable=[parameter.requires_grad for parameter in parameters.values()],
            state={name: _bytes(tensor) for name, tensor in model.state_dict().items()},
            outputs=model(images),
        )

    def compare(self, other: Snapshot) -> dict[str, bool]:
        """Statements, and whether they hold for the two snapshots."""
        size = sum(map(len, self.state.values()))
        return {
            "the same module objects in the same slots": _same_objects(self.modules, other.modules),
            "the same Parameter objects, as trainable as before": _same_objects(self.parameters, other.parameters)
            and self.trainable == other.trainable,
            "the same keys in the state dict, in the same order": list(self.state) == list(other.state),
            f"the same {size:,} bytes in it": self.state.keys() == other.state.keys()
            and all(torch.equal(tensor, other.state[name]) for name, tensor in self.state.items()),
            "the same outputs to the last bit": torch.equal(self.outputs, other.outputs),
        }


def _same_objects(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return list(one) == list(other) and all(one[name] is other[name] for name in one)


def _bytes(tensor: Tensor) -> Tensor:
    """Copy of its bytes (N,): as numbers, 0 and -0 would be equal, and NaN not equal to itself."""
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8)
