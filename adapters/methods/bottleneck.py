"""Bottleneck adapters: a small network of the output of a block, or of its input, is added to the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

import fluxion as fl
from adapters.adapter import base_modules
from adapters.errors import TargetError
from adapters.layers.calls import first_tensor, with_first_tensor
from adapters.layers.kinds import ATTENTION_PARTS, CONVOLUTIONS, TRANSPOSED, UNSUPPORTED, features_dim
from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale, add_scaled
from adapters.methods.core.checks import is_integer, need, need_choice, need_number
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": fl.GeLU,
    "relu": fl.ReLU,
    "sigmoid": fl.Sigmoid,
    "silu": fl.SiLU,
    "tanh": fl.Tanh,
}
"""The functions between the two layers, by name."""

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: fl.Conv1d, 2: fl.Conv2d, 3: fl.Conv3d}


@dataclass(frozen=True)
class Bottleneck(Method):
    """The adapters of Houlsby et al. (arXiv:1902.00751) and of Pfeiffer et al. (arXiv:2005.00247), and parallel ones.

    One goes after a layer or a block, such as an attention or a feed-forward module, and adds to the output a function
    of the output; or, with `parallel=True`, of the input (arXiv:2110.04366). Of a block that gives several things it
    adapts the first tensor. A convolution has a bottleneck of 1×1 convolutions.

    The targets make it one of the published adapters. After both sublayers, as Houlsby et al. place them:
    `["attention.output.dense", "output.dense"]` in BERT, `["o_proj", "down_proj"]` in Llama, and
    `["attn.c_proj", "mlp.c_proj"]` in GPT-2. After the feed-forward sublayer only, as Pfeiffer et al.:
    `"layer.*.output.dense"` with `exclude="attention.output.dense"`, `"down_proj"`, and `"mlp.c_proj"`. Beside that
    sublayer, with `parallel=True, scaling=4`: `"mlp"` in Llama and GPT-2. Such a last layer of a block is a better
    target than the block: `adapters.use(rows=...)` can mix its rows also where the block is handed a cache.

    Args:
        size: Features in the middle, by default those of the output divided by `reduction`.
        reduction: See `size`.
        activation: The function between the two layers, one of `ACTIVATIONS`.
        parallel: Adapt by the input rather than by the output.
        scaling: The factor of the network's output.
        norm: Begin with a layer normalisation, with weight and bias.
        features: The number of features of a block; by default those of the last layer in it.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.Bottleneck(reduction=4), targets="mlp")
        >>> patch.scale = 0.5
        >>> patch.enabled = False
    """

    key = "bottleneck"
    paper = "arXiv:1902.00751"
    formula = "f(x) + s U a(D f(x)), or f(x) + s U a(D x) if parallel"
    plus_lr = frozenset({"up"})
    mergeable = False

    size: int | None = None
    reduction: int = 16
    activation: str = "relu"
    parallel: bool = False
    scaling: float = 1.0
    norm: bool = False
    features: int | None = None

    def __post_init__(self) -> None:
        for name in ("size", "reduction", "features"):
            value = getattr(self, name)
            optional = value is None and name != "reduction"
            need(optional or is_integer(value, 1), self, f"a {name} of 1 or more", value)
        need_number(self, "scaling")
        need_choice(self, "activation", ACTIVATIONS)

    # Where it applies

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        runs = type(layer).forward is not nn.Module.forward  # A list of modules does not.
        if parameter != "weight" or not runs or isinstance(layer, (*UNSUPPORTED, ATTENTION_PARTS)):
            return None
        last = _last(layer)
        known = None if last is None else Matrix.of(last, "weight")
        if last is layer:
            return known
        features = self.features or (known.shape[0] if known else 0)
        return Matrix((features, features), "as is", "block") if features else None

    def default_targets(self, model: nn.Module) -> Callable[[str, nn.Module], bool]:
        raise TargetError(f"{type(self).__name__} goes after layers or blocks of your choice: name them with targets=.")

    def check_spec(self, spec: WeightSpec) -> None:
        if self.parallel and spec.matrix.kind in ("convolution", "embedding"):
            raise TargetError(
                f"{spec.path} takes other positions or features than it gives: give it a {type(self).__name__} with"
                " parallel=False."
            )
        if self.norm and _spatial(spec.layer):
            raise TargetError(f"{spec.path} gives channels, which norm=True does not normalise: give it norm=False.")

    # Its tensors and its formula

    def build(self, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        outputs, inputs = spec.shape
        size = self.size or max(outputs // self.reduction, 1)
        spatial = _spatial(spec.layer)
        where: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}

        def layer(inputs: int, outputs: int) -> nn.Module:
            return (
                _CONVOLUTIONS[spatial](inputs, outputs, 1, **where) if spatial else fl.Linear(inputs, outputs, **where)
            )

        inputs = inputs if self.parallel else outputs
        branch, up = Branch(), layer(size, outputs)
        for parameter in up.parameters():
            nn.init.zeros_(parameter)
        if self.norm:
            branch.add_module("norm", fl.LayerNorm(inputs, **where))
        branch.add_module("down", layer(inputs, size))
        branch.append(ACTIVATIONS[self.activation]())
        branch.add_module("up", up)
        if self.scaling != 1:
            branch.append(fl.Multiply(self.scaling))
        return branch

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        output = layer(*args, **kwargs)
        base = _checked(branch, first_tensor(output), branch.up.weight.shape[0], "gives")
        source = first_tensor((*args, *kwargs.values())) if self.parallel else base
        source = _checked(branch, source, branch.down.weight.shape[1], "takes")
        return with_first_tensor(output, add_scaled(base, branch(branch.cast(source)).to(base.dtype), scale))


def _checked(branch: Branch, tensor: Tensor | None, features: int, verb: str) -> Tensor:
    """A tensor, if it has the features that the bottleneck was built for."""
    found = None if tensor is None else tensor.shape[features_dim(branch.down)]
    if found == features:
        return cast(Tensor, tensor)
    kind = type(branch.layer).__name__
    raise TargetError(f"A {kind} {verb} {found or 'no'} features, not {features}: say how many with features=.")


def _last(module: nn.Module) -> nn.Module | None:
    """The last linear layer or convolution in a module, or the module if it is one; those of patches do not count."""
    if Matrix.of(module, "weight") is not None:
        return module
    inside = base_modules(module)
    known = [layer for layer in inside if (matrix := Matrix.of(layer, "weight")) and matrix.kind != "embedding"]
    return known[-1] if known else None


def _spatial(module: nn.Module) -> int:
    """The number of dimensions after the channels in the output of a module."""
    last = _last(module)
    return len(last.kernel_size) if isinstance(last, (*CONVOLUTIONS, *TRANSPOSED)) else 0
