"""What a method is: hyperparameters, a formula, and how they become a branch beside a layer."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapters.branch import Branch, Tensors
from adapters.errors import AdapterError, TargetError
from adapters.layers import Matrix, is_narrow, read_weight, widened
from adapters.quantized import compute_dtype, is_quantized

if TYPE_CHECKING:
    from adapters.fusion import Thin
    from adapters.targets import Layer


Scale = float | Tensor
"""How strongly a branch acts, 1 for the method as its paper states it; or that for each row of a batch, `(rows,)`."""


@dataclass(eq=False)
class Site:
    """A weight that is to have a branch, and where the branch's tensors go.

    Attributes:
        path: The path of the layer in the model.
        layer: The layer.
        parameter: The name of the weight in it.
        matrix: What the weight is as a matrix.
        device: The device of new tensors.
        dtype: Their dtype.
        read: Gives the weight that the new branch will be applied to.
        blank: Whether what is trained gets its values from a file, so that no others need to be made.
    """

    path: str
    layer: nn.Module
    parameter: str
    matrix: Matrix
    device: torch.device
    dtype: torch.dtype
    read: Callable[[], Tensor | None] = field(repr=False)
    blank: bool = False

    @classmethod
    def of(
        cls,
        layer: Layer,
        method: Method,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        own: bool = False,
    ) -> Site:
        """That of a layer, by default on its device and in its dtype.

        Args:
            layer: The layer and the name of the weight.
            method: Says what the weight is as a matrix.
            device: Where the tensors go.
            dtype: Their dtype; by default single precision for a layer that is stored in 8 bits, and for one that is
                quantised what it computes in.
            own: Whether the branch is from a file: for the layer's own weight, whatever other patches do at the
                moment, and with values of its own.
        """
        module, parameter = layer.module, layer.parameter
        node = layer.node
        read: Callable[[], Tensor | None] = partial(read_weight, module, parameter)
        if node is not None:
            read = partial(node.own_weight if own else node.effective, parameter)
        holder, weight = module, module._parameters.get(parameter)
        if not method.mergeable:
            of_all = ((part, own) for part in module.modules() for own in part._parameters.values() if own is not None)
            holder, weight = next(of_all, (module, None))
        elif weight is None:
            weight = cast("nn.Parameter | None", read_weight(module, parameter))
        if dtype is None and is_quantized(weight):
            dtype = compute_dtype(holder, cast(Tensor, weight))
        if dtype is None and weight is not None and not (weight.is_floating_point() or weight.is_complex()):
            raise TargetError(f"{layer.path} has a weight of {weight.dtype}, no dtype to train in: pass dtype=.")
        if dtype is None and weight is not None:
            dtype = torch.float32 if is_narrow(weight.dtype) else weight.dtype
        # What a file has is not lost to a model whose weights come later.
        absent = weight is None or (own and weight.is_meta)
        return cls(
            layer.path,
            module,
            parameter,
            cast(Matrix, method.matrix(module, parameter)),
            torch.device(device or ("cpu" if absent else cast(Tensor, weight).device)),
            dtype or torch.get_default_dtype(),
            read,
            own,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: `(outputs, inputs)`, with the experts in front for a stack."""
        return self.matrix.shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel of a convolution, `()` for what is none."""
        return tuple(cast(Any, self.layer).kernel_size) if self.matrix.kind == "convolution" else ()

    @property
    def kind(self) -> object:
        """Equal for weights whose branches of one method differ only in their values."""
        layer = self.layer
        known = type(layer).__module__.startswith("torch.nn.")  # What it says of itself is all there is to it.
        look = layer.extra_repr() if known else id(layer)
        return type(layer), look, self.parameter, self.matrix, self.device, self.dtype

    @cached_property
    def weight(self) -> Tensor:
        """The matrix of the weight, in at least single precision."""
        return self.matrix.read(widened(cast(Tensor, self.read()).detach()))

    @property
    def bias_name(self) -> str | None:
        """The name of the bias that goes with the weight, be it None; None where the layer knows no such parameter."""
        name = f"{self.parameter.removesuffix('weight')}bias"
        return name if self.parameter.endswith("weight") and hasattr(self.layer, name) else None

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias to what it makes of the weight."""
        return self.bias_name is not None and getattr(self.layer, self.bias_name) is not None

    def empty(self, *shape: int) -> Tensor:
        """A new tensor without values."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """A new tensor of zeros."""
        return self.empty(*shape).zero_()

    def ones(self, *shape: int) -> Tensor:
        """A new tensor of ones."""
        return self.empty(*shape).fill_(1.0)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """A new tensor of normally distributed values around 0."""
        return self.empty(*shape) if self.blank else self.empty(*shape).normal_(std=std)

    def shuffled(self, seed: int | None) -> Tensor:
        """The places in a matrix, counted row by row, in a random order: for one seed the same on any device."""
        count = self.shape[-2] * self.shape[-1]
        if self.device.type == "meta":
            return self.empty(count).long()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.randperm(count, generator=generator, device="cpu")

    def uniform(self, *shape: int, bound: float | None = None) -> Tensor:
        """A new tensor of values up to a bound to either side; by default that of torch's linear layers, `1 / √n`."""
        bound = 1 / math.sqrt(math.prod(shape[1:])) if bound is None else bound
        return self.empty(*shape) if self.blank else self.empty(*shape).uniform_(-bound, bound)


@dataclass(frozen=True)
class Method(ABC):
    """The hyperparameters of an adapter and its formula. Subclasses are frozen dataclasses in `adapters.methods`.

    A subclass states `tensors` and `update`; or it extends one of the classes of `adapters.forms`, which say the same
    of the output or the input of a layer, where that is the shorter or the faster way.

    Attributes:
        key: The name of the method in files.
        paper: Where it comes from.
        formula: What becomes of the weight `W`, in a line.
        kinds: The kinds of `Matrix` that it can adapt.
        adapts: What it adapts in words, where that is not a kind of layer.
        fast: The tensors that may learn faster than the others.
        additive: Whether it adds to the weight what does not depend on it. Then patches can be combined.
        mergeable: Whether it can be stated as a change of weights.
        tied_in_files: Whether a layer of a file stands for those too that use the same weight in the same way, which
            have no entry of their own.
        files_have_buffers: Whether files hold the buffers of a layer beside the tensors, as copies of layers do.
        stored_as: The key of the method that it is in files, where that is another.
        rooted: Whether a model has one, where the method goes by default: files name no layer of it.
    """

    key: ClassVar[str]
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    adapts: ClassVar[tuple[str, ...]] = ()
    fast: ClassVar[frozenset[str]] = frozenset()
    additive: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    tied_in_files: ClassVar[bool] = False
    files_have_buffers: ClassVar[bool] = False
    stored_as: ClassVar[str] = ""
    rooted: ClassVar[bool] = False

    # What it adapts

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        """How it sees that weight of that layer, or None where it cannot adapt it."""
        matrix = Matrix.of(layer, parameter)
        return matrix if matrix is not None and matrix.kind in self.kinds else None

    def chooses(self, parameter: str) -> bool:
        """Whether this is a parameter to adapt in a layer that was chosen, rather than only if it is named itself."""
        return parameter == "weight"

    def within(self) -> bool:
        """Whether to choose a module is to choose everything below it."""
        return False

    def default(self, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
        """What to adapt when no targets are named; None for every layer but the output head."""
        return None

    def check_site(self, site: Site) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where the hyperparameters do not fit a weight."""

    def check_training(self, layer: nn.Module, parameter: str) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where these hyperparameters cannot be kept in training."""

    def check_tensors(self, site: Site, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where tensors of a file have values that cannot be, such as the number of no row."""

    # Its tensors

    def tensors(self, site: Site) -> dict[str, Tensor]:
        """The tensors to train, by name, with values that change nothing yet."""
        raise NotImplementedError

    def constants(self, site: Site) -> dict[str, Tensor]:
        """Tensors that are never trained."""
        return {}

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Tensors that all branches have in common: parameters, if they are to be trained.

        Args:
            sites: Every weight that has this method, with these hyperparameters, in one patch.
        """
        return {}

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """The shapes of what `shared` makes, for those who have the values already."""
        return {}

    def share(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """What `shared` makes, as parameters for `build`: one object for all branches.

        They are parameters even where they are never trained. A buffer would be another tensor in each branch after
        the model has moved or changed its dtype.
        """
        return {
            name: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            for name, tensor in self.shared(sites).items()
        }

    def build(self, site: Site, shared: dict[str, Tensor]) -> Branch:
        """A branch for one weight.

        Args:
            site: The weight.
            shared: What `share` made for all weights.

        Raises:
            TargetError: The hyperparameters do not fit this weight.
        """
        branch = Branch()
        for name, tensor in self.tensors(site).items():
            branch.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in self.constants(site).items():
            branch.register_buffer(name, tensor)
        for name, tensor in shared.items():
            branch.register_parameter(name, cast(nn.Parameter, tensor))
        branch.common = frozenset(shared)
        branch.constants = frozenset(name for name, tensor in shared.items() if not tensor.requires_grad)
        return branch

    def starts(self, sites: Sequence[Site], like: Mapping[str, Tensor]) -> Iterable[Sequence[Tensor]] | None:
        """The first values of the parameters of many branches, made together; None where `build` makes them.

        Args:
            sites: Weights of one kind.
            like: The parameters of a branch for another weight of that kind.
        """
        return None

    def names(self, site: Site) -> tuple[str, ...]:
        """The parameters of the layer that it changes, the weight first, then the bias if it changes that."""
        return (site.parameter,) if self.mergeable else ()

    # Its formula

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        """What becomes of the weight.

        Args:
            weight: The matrix, `(outputs, inputs)`, with the experts in front for a stack.
            t: The tensors, in the same dtype.

        Returns:
            A new tensor: a merged layer keeps it.
        """
        raise NotImplementedError

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        """What becomes of the bias, of shape `(outputs,)`, or of there being none."""
        return bias

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        """What becomes of the weight at a strength: on the line from the weight, at 0, to its update, at 1."""
        return between(weight, self.update(weight, t), scale)

    def beside(self, layer: nn.Module, matrix: Matrix) -> bool:
        """Whether `run` is the way to compute it, for a layer whose output is linear in its weight."""
        return not self.mergeable

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        """The output of a layer together with the branch, computed beside the layer rather than in its weight."""
        raise NotImplementedError

    def thin(self, branch: Branch) -> Thin | None:
        """The layers that the branch is made of, where it adds two thin matrices to the weight of a linear layer.

        None for anything else, and for a branch that was changed by hand.
        """
        return None

    # Files and pictures

    def settings(self) -> dict[str, Any]:
        """The hyperparameters that are worth showing: neither nothing nor a choice that is the usual one."""
        usual = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if value and not (value == usual[name] and isinstance(value, str))
        }

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def hyperparameters(self) -> dict[str, Any]:
        """What a file needs to say besides the tensors."""
        return asdict(self)

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of a branch under the names and in the shapes that files give them, sharing their memory."""
        return {name: tensor for name, tensor in branch.tensors().items() if name not in branch.common}

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        """What a file says of a branch: the method to load it with, and the tensors."""
        return self, self.file_tensors(branch)


def between(start: Tensor, end: Tensor, scale: Scale) -> Tensor:
    """What lies on the line from one tensor, at 0, to another, at 1, which is taken as it is."""
    if isinstance(scale, Tensor):
        return start.lerp(end, _for_rows(scale, end))
    return end if scale == 1 else start.lerp(end, scale)


def added(output: Tensor, update: Tensor, scale: Scale) -> Tensor:
    """An output with an update at a strength."""
    if isinstance(scale, Tensor):
        return output + update * _for_rows(scale, update)
    return output.add(update, alpha=scale)


def _for_rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.dtype).view(-1, *(1 for _ in like.shape[1:]))


def need(holds: bool, method: object, what: str, value: object) -> None:
    """Raise an AdapterError that says what a method needs, unless it holds."""
    if not holds:
        raise AdapterError(f"{type(method).__name__} needs {what}, not {value!r}.")


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether a hyperparameter is an integer, no boolean, and large enough."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no integer of more bits than torch can multiply by."""
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) < 2**63


def need_rank(method: Any) -> None:
    """Check `rank`."""
    need(is_integer(method.rank, 1), method, "a rank that is an integer of 1 or more", method.rank)


def need_alpha(method: Any) -> None:
    """Check `alpha`, and make it the rank where it is None."""
    if method.alpha is None:
        object.__setattr__(method, "alpha", float(method.rank))
    need(is_number(method.alpha), method, "an alpha that is a finite number", method.alpha)


def need_number(method: Any, name: str) -> None:
    """Check that a hyperparameter is a finite number."""
    value = getattr(method, name)
    need(is_number(value), method, f"{name} to be a finite number", value)


def need_count(method: Any, name: str) -> None:
    """Check that a hyperparameter is an integer of 1 or more."""
    value = getattr(method, name)
    need(is_integer(value, 1), method, f"{name} to be an integer of 1 or more", value)


def need_seed(method: Any) -> None:
    """Check `seed`."""
    need(is_integer(method.seed), method, "a seed that is an integer", method.seed)
    need(-(2**63) <= method.seed < 2**63, method, "a seed of 64 bits", method.seed)


def need_choice(method: Any, name: str, choices: Iterable[str]) -> None:
    """Check that a hyperparameter is one of some names."""
    value, known = getattr(method, name), tuple(choices)
    article = "an" if name[0] in "aeiou" else "a"
    need(value in known, method, f"{article} {name} out of {', '.join(known)}", value)


def need_dropout(method: Any) -> None:
    """Check `dropout`."""
    fits = is_number(method.dropout) and 0 <= method.dropout < 1
    need(fits, method, "a dropout of 0 or more and less than 1", method.dropout)


def refuse_dropout(method: Any, layer: nn.Module) -> None:
    """Raise a TargetError if a method is to drop inputs of a layer whose weight it changes, where it sees none."""
    if method.dropout:
        raise TargetError(
            f"A {type(layer).__name__} is adapted through its weight, where no input can be dropped: give it a"
            f" {type(method).__name__} with dropout=0, or exclude it."
        )
