"""`combine`: the weighted sum of patches as a new patch, exact, of a lower rank, or pruned first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError, PatchStateError
from adapters.layers.matrix import Matrix
from adapters.layers.sharded import check_before
from adapters.layers.weight import read_weight
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core import formulas
from adapters.methods.core.building import build
from adapters.methods.core.checks import is_integer, is_number
from adapters.methods.core.method import Branch, Method
from adapters.methods.lora import LoRA
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch, patches
from adapters.patch.registry import check_name, named
from adapters.targets.models import Model, as_module
from adapters.targets.spec import weight_spec
from adapters.targets.target import Target, all_targets

How = Literal["exact", "svd", "magnitude", "ties", "dare"]
"""The ways to combine."""

Pruning = Callable[[list[Tensor], float, torch.Generator | None], Tensor]
"""One matrix from several that are weighted already, given a density and a random generator."""


def combine(
    model: Model,
    weights: Mapping[str, float],
    *,
    name: str = "combined",
    how: How = "exact",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Patch:
    """Inject a new LoRA patch that computes a weighted sum of patches of a model.

    Its sources stay as they are, and active: eject them, disable them, or choose by `use(model, name)`. With
    `Dᵢ` the update of a layer's weight by patch `i` at scale 1, whatever its rank, alpha or method, and `wᵢ` its weight
    here, the new update is, for each layer that any of the patches adapts,

    - `"exact"`: `Σ wᵢ Dᵢ`, as `use(model, weights)` computes it, to rounding. Low-rank factors are concatenated, so
      that ranks add up, to no more than the full rank; no full matrix is made of them.
    - `"svd"`: the nearest matrix to `Σ wᵢ Dᵢ` of the rank that is given, or that keeps the energy, from truncated
      singular values, without a full matrix either.
    - `"magnitude"`: `Σ wᵢ trim(Dᵢ)`, where `trim` keeps the entries of the largest magnitude, a share `density` of
      them, and makes the others zero.
    - `"ties"` (arXiv:2306.01708): entry by entry, the mean of those `wᵢ trim(Dᵢ)` that are not zero and have the sign
      of their sum. As it is a mean, each counts for one nth of its weight where n of them agree.
    - `"dare"` (arXiv:2311.03099): `Σ wᵢ mᵢ Dᵢ / density`, where each entry of the mask `mᵢ` is 1 with the probability
      `density` and 0 otherwise. `Σ wᵢ Dᵢ` is its expectation.

    The last three are computed on full matrices, one layer at a time, and then factorised as by `"svd"`.

    Args:
        model: The model that the patches are injected in.
        weights: The names of the patches and their weights, of any sign. As in `use`, the scales of the patches
            themselves do not count.
        name: The name of the new patch.
        how: One of the above.
        rank: The largest rank for a layer, for all but `"exact"`. Each layer gets the rank at which it is exact up to
            rounding, at most its full one, the smaller side of its matrix; and of these at most `rank`, if it is given.
        energy: The share of the energy to keep, the squared Frobenius norm of the update, more than 0 and at most 1,
            for all but `"exact"`: each layer gets the least rank that keeps it, at most `rank`, if that is given too.
        density: The share of entries to keep, more than 0 and at most 1, for `"magnitude"`, `"ties"` and `"dare"`.
        seed: Random seed of the masks of `"dare"`, equal on every device, which leaves torch's generators alone.
        scale: How strongly the new patch acts.
        progress: Called with the number of layers that are done, and of all layers.

    Returns:
        The patch, injected. Each layer has a `LoRA` of a rank of its own, and `alpha = rank`. Its tensors are new, in
        the dtype of the sources, and do not require gradients. Its `errors` are the relative errors of the update at
        each path, `‖B A - D‖ / ‖D‖` in the Frobenius norm, rounding to the dtype included.

    Raises:
        PatchNameError: The model has no patch of one of the names, or has one of the new name.
        PatchStateError: A layer of a patch is no longer in the model.
        TargetError: Layers are sharded by tensor parallelism.
        AdapterError: Nothing to combine, an unknown `how`, a number that is missing, out of its range or of no use,
            or a patch whose updates cannot be added up or are not finite.

    Example:
        >>> for name in ("style", "pose"):
        ...     patch = adapters.inject(model, adapters.LoRA(rank=4), name=name)
        >>> both = adapters.combine(model, {"style": 0.7, "pose": 0.3}, name="both", how="svd", rank=2)
    """
    _check_weights(weights)
    combination = Combination(how, rank, energy, density, seed)
    model = as_module(model)
    check_name(model, name)
    attachments: list[Attachment] = []
    errors: dict[str, float] = {}
    with torch.no_grad():
        sums = _weighted_sums(model, weights)
        check_before((each.target for each in sums), trainable=False)
        for number, each in enumerate(sums, start=1):
            branch, errors[each.target.path] = combination.of(each)
            attachments.append(Attachment.of(each.target, branch))
            if progress is not None:
                progress(number, len(sums))
    patch = Patch(name, model, attachments, scale, freezes=False)
    patch.errors = errors
    return patch.inject()


def _check_weights(weights: Mapping[str, float]) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError('combine needs the names of patches and their weights: {"style": 0.7, "pose": 0.3}.')
    for name, weight in weights.items():
        if not is_number(weight):
            raise AdapterError(f"The weight of {name!r} has to be a finite number, not {weight!r}.")


class Combination:
    """Arithmetic of `combine`, for one target after the other.

    Args:
        how: As of `combine`, like the rest.
        rank: The largest rank.
        energy: The share of the energy to keep.
        density: The share of entries to keep.
        seed: Random seed.

    Raises:
        AdapterError: An unknown `how`, or a number that is missing, out of its range or of no use.
    """

    def __init__(
        self, how: How, rank: int | None, energy: float | None, density: float | None, seed: int | None
    ) -> None:
        if how not in get_args(How):
            raise AdapterError(f"how={how!r} is no way to combine: choose from {', '.join(get_args(How))}.")
        for name, number in (("rank", rank), ("energy", energy)):
            if number is not None and how == "exact":
                raise AdapterError(
                    f"how='exact' keeps every rank: leave {name}= out, or choose how='svd' to reduce it."
                )
        check_size(rank, energy)
        if density is None and how in PRUNINGS:
            raise AdapterError(f"how={how!r} needs density=, the share of entries to keep.")
        if density is not None and how not in PRUNINGS:
            raise AdapterError(f"how={how!r} keeps every entry: density= is for {', '.join(PRUNINGS)}.")
        if density is not None and not (is_number(density) and 0 < density <= 1):
            raise AdapterError(f"density= has to be more than 0 and at most 1, not {density!r}.")
        self._how, self._rank, self._energy, self._density = how, rank, energy, density
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def of(self, each: WeightedSum) -> tuple[Branch, float]:
        """The LoRA branch that computes a weighted sum, and its relative error.

        Raises:
            AdapterError: The sum is not finite.
        """
        if self._density is None:
            update = each.exact()
        else:
            update = LowRank.full(PRUNINGS[self._how](each.updates(), self._density, self._generator))
        if not update.is_finite():
            raise AdapterError(f"The update at {each.target.path} is not finite, and cannot be combined.")
        kept = update if self._how == "exact" else update.truncated(self._rank, self._energy)
        branch = lora_of(each.target, kept, each.dtype)
        return branch, each.low_rank(branch, 1.0).error(update)


def check_size(rank: int | None, energy: float | None) -> None:
    """Raise an AdapterError for an invalid rank, or share of the energy."""
    if rank is not None and not is_integer(rank, 1):
        raise AdapterError(f"rank= has to be an integer of 1 or more, not {rank!r}.")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise AdapterError(f"energy= has to be more than 0 and at most 1, not {energy!r}.")


# Weighted sums


@dataclass
class WeightedSum:
    """The branches of several patches at one target, with their weights, and the target's weight as a matrix."""

    target: Target
    sources: list[tuple[Branch, float]]
    matrix: Matrix

    @classmethod
    def of(cls, target: Target, sources: list[tuple[Branch, float]], name: str) -> WeightedSum:
        """The weighted sum at a target, of branches of which the first is of the patch of that name.

        Raises:
            AdapterError: A LoRA cannot adapt the target.
        """
        matrix = LoRA().matrix(target.module, target.parameter)
        if matrix is None:
            raise AdapterError(
                f"{name!r} cannot be combined: {target.path} is not a 2-D weight, which a LoRA could change. Use the"
                " patches side by side."
            )
        return cls(target, sources, matrix)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for branch, _ in self.sources for tensor in branch.parameters()]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the tensors of all branches are promoted to."""
        return functools.reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    @property
    def precision(self) -> torch.dtype:
        """The dtype to compute in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def update(self, branch: Branch, weight: float) -> Tensor:
        """The matrix that a branch adds to the target's, computed from a weight of zero."""
        zero = torch.zeros(branch.matrix.shape, dtype=self.precision, device=branch.device)
        update = branch.method.change(zero, branch.values(self.precision), weight).to(self.device)
        if branch.matrix == self.matrix:
            return update
        return self.matrix.read(
            branch.matrix.write(update, like=read_weight(self.target.module, self.target.parameter))
        )

    def updates(self) -> list[Tensor]:
        """The weighted matrix of each branch."""
        return [self.update(branch, weight) for branch, weight in self.sources]

    def low_rank(self, branch: Branch, weight: float) -> LowRank:
        """The weighted matrix of a branch in factors, those of the method where it has some."""
        method = branch.method
        if not method.is_low_rank:
            return LowRank.full(self.update(branch, weight))
        up, down = cast(formulas.LowRank, method).factors(branch.values(self.precision))
        return LowRank((up * weight).to(self.device), down.to(self.device))

    def exact(self) -> LowRank:
        """The sum of the weighted matrices, at most of full rank."""
        update = LowRank.join([self.low_rank(branch, weight) for branch, weight in self.sources])
        return update if update.rank <= min(update.shape[-2:]) else LowRank.full(update.matrix())


def lora_of(target: Target, update: LowRank, dtype: torch.dtype) -> Branch:
    """The LoRA branch for a target that adds an update of scale 1."""
    method = LoRA(rank=update.rank)
    # Made without memory at first, as its initial values would be of no use.
    branch = build(method, weight_spec(target, method, "meta", dtype), {})
    branch.to_empty(device=update.up.device).requires_grad_(False)
    for tensor, factor in zip(method.file_tensors(branch).values(), (update.down, update.up), strict=True):
        tensor.copy_(factor.reshape(tensor.shape))
    return branch


def check_additive(name: str, path: str, method: Method) -> None:
    """Raise an AdapterError for a method of a patch whose updates cannot be added up."""
    if not method.additive:
        raise AdapterError(
            f"{name!r} cannot be combined: at {path}, {type(method).__name__} makes no update that could be added to"
            " another. Use the patches side by side."
        )


def _weighted_sums(model: nn.Module, weights: Mapping[str, float]) -> list[WeightedSum]:
    """Every target that any of the patches adapts, in the order of the model."""
    known = patches(model)
    sources: dict[tuple[int, str], list[tuple[Branch, float]]] = {}
    for name, weight in weights.items():
        for attachment in named(known, name).attachments:
            branch = attachment.branch
            check_additive(name, attachment.path, branch.method)
            sources.setdefault((id(attachment.target), branch.parameter), []).append((branch, float(weight)))
    targets = {(id(target.module), target.parameter): target for target in all_targets(model)}
    for key, ((branch, _), *_) in sources.items():
        if key not in targets:
            raise PatchStateError(f"The patch {branch.switch.name!r} has a layer that is not in this model: eject it.")
    found = ((target, sources[key]) for key, target in targets.items() if key in sources)
    return [WeightedSum.of(target, branches, branches[0][0].switch.name) for target, branches in found]


# Pruning


def _trimmed(update: Tensor, density: float) -> Tensor:
    """The entries of the largest magnitude, the others zero."""
    flat = update.flatten()
    kept = flat.abs().topk(max(1, round(density * len(flat)))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(update)


def _magnitude(updates: list[Tensor], density: float, generator: torch.Generator | None) -> Tensor:
    return torch.stack([_trimmed(update, density) for update in updates]).sum(0)


def _ties(updates: list[Tensor], density: float, generator: torch.Generator | None) -> Tensor:
    trimmed = torch.stack([_trimmed(update, density) for update in updates])
    agree = trimmed.sign() == trimmed.sum(0).sign()
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _dare(updates: list[Tensor], density: float, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU, so that a seed means the same everywhere.
    masks = [torch.rand(update.shape, generator=generator) < density for update in updates]
    return torch.stack([u * mask.to(u.device) / density for u, mask in zip(updates, masks, strict=True)]).sum(0)


PRUNINGS: Mapping[str, Pruning] = {"magnitude": _magnitude, "ties": _ties, "dare": _dare}
"""Prunings of full matrices, by the name of `how`."""
