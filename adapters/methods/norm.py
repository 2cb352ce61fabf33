"""Norm tuning: the weights and the biases of normalisation layers are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from adapters.layers.matrix import Matrix
from adapters.methods.core.copies import ParameterCopy

# Batch and instance normalisations extend _NormBase.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


@dataclass(frozen=True)
class NormTuning(ParameterCopy):
    """A copy of the weight and the bias of every normalisation layer that is named: by default of all.

    A layer is a normalisation if it is one of torch's, or if its class is named so (`LlamaRMSNorm`) and its weight
    has one dimension. Running means and variances stay those of the model, also in training.

    Example:
        >>> patch = adapters.inject(model, adapters.NormTuning())
        >>> print(sorted(patch.state_dict()))
        >>> patch.save_pretrained("norms")
    """

    key = "norm"
    paper = "arXiv:2312.11420"
    formula = "w' and b', which start as copies of the weight w and the bias b"
    files_have_buffers = True

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return super().matrix(layer, parameter) if self.selects(parameter) and _is_norm(layer) else None

    def selects(self, parameter: str) -> bool:
        return parameter in ("weight", "bias")


def _is_norm(layer: nn.Module) -> bool:
    if isinstance(layer, _NORMS):
        return True
    named = any(kind.__name__.endswith("Norm") for kind in type(layer).__mro__)
    return named and isinstance(weight := getattr(layer, "weight", None), Tensor) and weight.ndim == 1
