"""Making branches: one for each weight, and many that are alike together, which is quicker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from fluxion.module import ContextModule, Template, shallow_copy


def share(sites: Iterable[tuple[Method, WeightSpec]]) -> dict[Method, dict[str, Tensor]]:
    """What the weights of each method have in common."""
    by_method: dict[int, tuple[Method, list[WeightSpec]]] = {}
    for method, site in sites:
        by_method.setdefault(id(method), (method, []))[1].append(site)  # Few objects: no hash of one for each site.
    equal: dict[Method, list[WeightSpec]] = {}
    for method, some in by_method.values():
        equal.setdefault(method, []).extend(some)
    return {method: method.share(some) for method, some in equal.items()}


def build(method: Method, site: WeightSpec, shared: dict[str, Tensor]) -> Branch:
    """A new branch of a method for a weight, with the tensors that it shares with others."""
    branch = method.build(site, shared)
    branch.method, branch.matrix, branch.parameter = method, site.matrix, site.parameter
    branch.names = method.names(site)
    branch.bypass = method.bypass(site.layer, site.matrix) and (not branch.names or site.parameter == "weight")
    return branch


def build_all(wanted: Sequence[tuple[Method, WeightSpec]]) -> list[Branch]:
    """New branches to train, each of a method for a weight.

    Raises:
        TargetError: A method has nothing to train at a weight, or its hyperparameters do not fit it.
    """
    shared = share(wanted)
    alike: dict[object, list[int]] = {}
    for number, (method, site) in enumerate(wanted):
        alike.setdefault((id(method), site.kind), []).append(number)
    branches: dict[int, Branch] = {}
    for numbers in alike.values():
        method, sites = wanted[numbers[0]][0], [wanted[number][1] for number in numbers]
        first = build(method, sites[0], shared[method])
        if next(first.named_weights(), None) is None:
            raise TargetError(f"{method} has nothing to train at {sites[0].path}: exclude it, or choose other numbers.")
        mould, values = Mould.of(first), None
        if mould is not None:
            values = method.starts(sites[1:], mould.parameters) if len(sites) > 1 else ()
        if mould is None or values is None:
            made = [first, *(build(method, site, shared[method]) for site in sites[1:])]
        else:  # The first one as well: compiled graphs of blocks that are alike are shared if all of them are.
            made = [mould.cast(some) for some in (mould.parameters.values(), *values)]
        branches.update(zip(numbers, made, strict=True))
    return [branches[number] for number in range(len(wanted))]


class Mould:
    """A branch to make others of that differ in the values of their parameters only.

    Attributes:
        parameters: Those of the branch by name.
    """

    def __init__(self, branch: Branch) -> None:
        self.parameters = dict(branch.named_parameters())
        self._branch = Template(branch)
        self._children = [(key, Template(child)) for key, child in branch._modules.items()]
        self._places = [name.rpartition(".")[::2] for name in self.parameters]

    @classmethod
    def of(cls, branch: Branch) -> Mould | None:
        """That of a branch, unless there is more to it than parameters, its own or those of layers in it."""
        modules = list(branch._modules.values())
        more = any(module._buffers for module in (branch, *modules)) or any(
            module._modules or isinstance(module, ContextModule) for module in modules
        )
        return None if branch.common or more else cls(branch)

    def cast(self, values: Iterable[Tensor], requires_grad: bool = True) -> Branch:
        """A branch with parameters of these values, which are in the order of `parameters`, and kept as they are."""
        branch = self._branch.copy()
        modules = branch._modules
        branch.__dict__.pop("_provider", None)
        for key, template in self._children:
            modules[key] = template.copy()
        for (key, name), value in zip(self._places, values, strict=True):
            (modules[key] if key else branch)._parameters[name] = nn.Parameter(value, requires_grad)
        return branch


def tied_to(branch: Branch) -> Branch:
    """The same branch for another use of the weight: a copy of the structure, which shares the tensors."""
    twin = branch.structural_copy()
    for key, module in twin._modules.items():
        if not (module._parameters or module._modules):
            twin._modules[key] = shallow_copy(module)  # The layers may be in different modes.
    twin.tied = True
    return twin
