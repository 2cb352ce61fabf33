"""Building of branches, those of equal weights together, which is faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from fluxion.copying import Template, shallow_copy
from fluxion.links import ContextModule


def share(specs: Iterable[tuple[Method, WeightSpec]]) -> dict[Method, dict[str, Tensor]]:
    """The shared tensors of each method, as parameters: one object for all branches.

    They are parameters even where they are never trained. A buffer would be another tensor in each branch after the
    model has moved or changed its dtype.
    """
    by_method: dict[int, tuple[Method, list[WeightSpec]]] = {}
    for method, spec in specs:
        by_method.setdefault(id(method), (method, []))[1].append(spec)  # Few objects: no hash of one for each weight.
    equal: dict[Method, list[WeightSpec]] = {}
    for method, some in by_method.values():
        equal.setdefault(method, []).extend(some)
    return {
        method: {
            name: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            for name, tensor in method.shared(some).items()
        }
        for method, some in equal.items()
    }


def build(method: Method, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
    """A new branch of a method for a weight, with the tensors that it shares with others."""
    branch = method.build(spec, shared)
    branch.method, branch.matrix, branch.parameter = method, spec.matrix, spec.parameter
    branch.names = method.changes(spec)
    branch.bypass = method.bypass(spec.layer, spec.matrix) and (not branch.names or spec.parameter == "weight")
    return branch


def build_all(wanted: Sequence[tuple[Method, WeightSpec]]) -> list[Branch]:
    """New branches to train, each of a method for a weight.

    Raises:
        TargetError: A method has nothing to train at a weight, or its hyperparameters do not fit it.
    """
    shared = share(wanted)
    alike: dict[object, list[int]] = {}
    for number, (method, spec) in enumerate(wanted):
        alike.setdefault((id(method), spec.kind), []).append(number)
    branches: dict[int, Branch] = {}
    for numbers in alike.values():
        method, specs = wanted[numbers[0]][0], [wanted[number][1] for number in numbers]
        first = build(method, specs[0], shared[method])
        if next(first.named_weights(), None) is None:
            raise TargetError(
                f"{method} has nothing to train at {specs[0].path}: exclude it, or choose other hyperparameters."
            )
        mould, values = Mould.of(first), None
        if mould is not None:
            values = method.initial_values(specs[1:], mould.parameters) if len(specs) > 1 else ()
        if mould is None or values is None:
            made = [first, *(build(method, spec, shared[method]) for spec in specs[1:])]
        else:  # The first one as well: compiled graphs of blocks that are alike are shared if all of them are.
            made = [mould.cast(some) for some in (mould.parameters.values(), *values)]
        branches.update(zip(numbers, made, strict=True))
    return [branches[number] for number in range(len(wanted))]


class Mould:
    """A template of branches that differ in the values of their parameters only.

    Attributes:
        parameters: The parameters of the branch that it was made of, by name.
    """

    def __init__(self, branch: Branch) -> None:
        self.parameters = dict(branch.named_parameters())
        self._branch = Template(branch)
        self._children = [(key, Template(child)) for key, child in branch._modules.items()]
        self._places = [name.rpartition(".")[::2] for name in self.parameters]

    @classmethod
    def of(cls, branch: Branch) -> Mould | None:
        """The mould of a branch, or None if it holds more than parameters, its own or those of layers in it."""
        modules = list(branch._modules.values())
        more = any(module._buffers for module in (branch, *modules)) or any(
            module._modules or isinstance(module, ContextModule) for module in modules
        )
        return None if branch.common or more else cls(branch)

    def cast(self, values: Iterable[Tensor], requires_grad: bool = True) -> Branch:
        """A branch whose parameters are these tensors, in the order of `parameters`."""
        branch = self._branch.copy()
        modules = branch._modules
        branch.__dict__.pop("_provider", None)
        for key, template in self._children:
            modules[key] = template.copy()
        for (key, name), value in zip(self._places, values, strict=True):
            (modules[key] if key else branch)._parameters[name] = nn.Parameter(value, requires_grad)
        return branch


def tied_to(branch: Branch) -> Branch:
    """A branch for another use of the same weight: a copy of the structure, which shares the tensors."""
    twin = branch.structural_copy()
    for key, module in twin._modules.items():
        if not (module._parameters or module._modules):
            twin._modules[key] = shallow_copy(module)  # The layers may be in different modes.
    twin.tied = True
    return twin
