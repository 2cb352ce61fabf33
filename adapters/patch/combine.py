"""`combine`: a new patch that stands for the weighted sum of others, exact, reduced, or pruned first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError, PatchStateError
from adapters.layers.matrix import Matrix
from adapters.layers.sharded import check_before
from adapters.layers.weight import read_weight
from adapters.lowrank.svd import Factors, error, full, reduced
from adapters.methods.core.building import build
from adapters.methods.core.checks import is_integer, is_number
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Branch
from adapters.methods.lora import LoRA
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch, find
from adapters.patch.registry import check_name
from adapters.targets.models import Model, as_module
from adapters.targets.spec import weight_spec
from adapters.targets.target import Target, all_targets

Pruning = Callable[[list[Tensor], float, torch.Generator | None], Tensor]
"""Makes one matrix of several that are weighted already, given a density and where chance comes from."""


def combine(
    model: Model,
    weights: Mapping[str, float],
    *,
    name: str = "combined",
    how: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    scale: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Patch:
    """Inject a new LoRA patch that stands for a weighted sum of patches of a model.

    It acts beside its sources, which stay as they are: eject them, disable them, or choose by `use(model, name)`. With
    `Dᵢ` the update of a layer's weight by patch `i` at scale 1, whatever its rank, alpha or method, and `wᵢ` its weight
    here, the new update is, for each layer that any of the patches adapts,

    - `"exact"`: `Σ wᵢ Dᵢ`, what `use(model, weights)` computes, to rounding. Factors of low rank are put side by side,
      so that ranks add up, to no more than the full rank; no full matrix is made of them.
    - `"svd"`: of all matrices of the rank that is given, or that keeps the energy, the nearest to `Σ wᵢ Dᵢ`, which is
      not made in full either.
    - `"magnitude"`: `Σ wᵢ trim(Dᵢ)`, where `trim` keeps the entries of the largest magnitude, a share `density` of
      them, and makes the others zero.
    - `"ties"` (arXiv:2306.01708): entry by entry, the mean of those `wᵢ trim(Dᵢ)` that are not zero and have the sign
      of their sum. As it is a mean, each counts for one nth of its weight where n of them agree.
    - `"dare"` (arXiv:2311.03099): `Σ wᵢ mᵢ Dᵢ / density`, where each entry of the mask `mᵢ` is 1 with the probability
      `density` and 0 otherwise. `Σ wᵢ Dᵢ` is its expectation.

    The last three are computed on full matrices, one layer at a time, and then factorised as by `"svd"`.

    Args:
        model: The model that the patches are injected in.
        weights: The names of the patches and their weights, of any sign. As in `use`, the patches' own scales do not
            count.
        name: The name of the new patch.
        how: One of the above.
        rank: The largest rank for a layer, for all but `"exact"`. Each layer gets the rank at which it is exact up to
            rounding, at most its full one, the smaller side of its matrix; and of these at most `rank`, if it is given.
        energy: The share of the energy to keep, the squared Frobenius norm of the update, more than 0 and at most 1,
            for all but `"exact"`: each layer gets the least rank that keeps it, at most `rank`, if that is given too.
        density: The share of entries to keep, more than 0 and at most 1, for `"magnitude"`, `"ties"` and `"dare"`.
        seed: Makes the masks of `"dare"` the same each time and on every device, without touching torch's generators.
        scale: How strongly the new patch acts.
        progress: Called with the number of layers that are done, and that of all.

    Returns:
        The patch, injected. Each layer has a `LoRA` of a rank of its own, and `alpha = rank`. Its tensors are new, in
        the dtype of the sources, and do not require gradients. Its `errors` tell for each path how far the update is
        off the one it stands for, `‖B A - D‖ / ‖D‖` in the Frobenius norm, what the dtype rounds included.

    Raises:
        PatchNameError: The model has no patch of one of the names, or has one of the new name.
        PatchStateError: A layer of a patch is no longer in the model.
        TargetError: Layers are divided by tensor parallelism.
        AdapterError: Nothing to combine, an unknown `how`, a number that is missing, out of its range or of no use,
            or a patch whose updates cannot be added up or are not finite.
    """
    _check(weights, how, rank, energy, density)
    model = as_module(model)
    check_name(model, name)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    places: list[Attachment] = []
    errors: dict[str, float] = {}
    with torch.no_grad():
        sites = _sites(model, weights)
        check_before((site.layer for site in sites), trainable=False)
        for number, site in enumerate(sites, start=1):
            update = site.weighted_sum() if density is None else full(PRUNINGS[how](site.updates(), density, generator))
            if not all(factor.isfinite().all() for factor in update):
                raise AdapterError(f"What to combine at {site.layer.path} is not finite.")
            factors = update if how == "exact" else reduced(update, rank, energy)
            branch = lora_of(site.layer, factors, site.dtype)
            places.append(Attachment.of(site.layer, branch))
            errors[site.layer.path] = error(site.factors(branch, 1.0), update)
            if progress is not None:
                progress(number, len(sites))
    patch = Patch(name, model, places, scale, freezes=False)
    patch.errors = errors
    return patch.inject()


def _check(
    weights: Mapping[str, float], how: str, rank: int | None, energy: float | None, density: float | None
) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError('combine needs the names of patches and their weights: {"style": 0.7, "pose": 0.3}.')
    for name, weight in weights.items():
        if not is_number(weight):
            raise AdapterError(f"The weight of {name!r} has to be a finite number, not {weight!r}.")
    known = ("exact", "svd", *PRUNINGS)
    if how not in known:
        raise AdapterError(f"{how!r} is no way to combine: choose from {', '.join(known)}.")
    for name, number in (("rank", rank), ("energy", energy)):
        if number is not None and how == "exact":
            raise AdapterError(f"how='exact' keeps every rank: leave {name}= out, or choose how='svd' to reduce it.")
    check_size(rank, energy)
    if density is None and how in PRUNINGS:
        raise AdapterError(f"how={how!r} needs density=, the share of entries to keep.")
    if density is not None and how not in PRUNINGS:
        raise AdapterError(f"how={how!r} keeps every entry: density= is for {', '.join(PRUNINGS)}.")
    if density is not None and not (is_number(density) and 0 < density <= 1):
        raise AdapterError(f"density= has to be more than 0 and at most 1, not {density!r}.")


def check_size(rank: int | None, energy: float | None) -> None:
    """Raise an AdapterError for what is no rank, or no share of an energy."""
    if rank is not None and not is_integer(rank, 1):
        raise AdapterError(f"rank= has to be an integer of 1 or more, not {rank!r}.")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise AdapterError(f"energy= has to be more than 0 and at most 1, not {energy!r}.")


# What there is to combine


@dataclass
class _Site:
    """A weight of a layer, the branches there with their weights, and what the weight is as a matrix."""

    layer: Target
    sources: list[tuple[Branch, float]]
    matrix: Matrix

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for branch, _ in self.sources for tensor in branch.parameters()]

    @property
    def dtype(self) -> torch.dtype:
        """What holds the tensors of all branches."""
        return functools.reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    @property
    def precision(self) -> torch.dtype:
        """What to compute in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def update(self, branch: Branch, weight: float) -> Tensor:
        """The matrix that a branch adds to the layer's: what it makes of zero."""
        zero = torch.zeros(branch.matrix.shape, dtype=self.precision, device=branch.device)
        update = branch.method.change(zero, branch.values(self.precision), weight).to(self.device)
        if branch.matrix == self.matrix:
            return update
        return self.matrix.read(branch.matrix.write(update, like=read_weight(self.layer.module, self.layer.parameter)))

    def updates(self) -> list[Tensor]:
        """The weighted matrix of each branch."""
        return [self.update(branch, weight) for branch, weight in self.sources]

    def factors(self, branch: Branch, weight: float) -> Factors:
        """The same matrix in factors, those of the method where it has some."""
        method = branch.method
        if not isinstance(method, LowRank):
            return full(self.update(branch, weight))
        up, down = method.factors(branch.values(self.precision))
        return (up * weight).to(self.device), down.to(self.device)

    def weighted_sum(self) -> Factors:
        """`Σ wᵢ upᵢ downᵢ = [w₁ up₁, w₂ up₂, ...] [down₁; down₂; ...]`, at most of full rank."""
        ups, downs = zip(*(self.factors(branch, weight) for branch, weight in self.sources), strict=True)
        up, down = torch.cat(ups, dim=-1), torch.cat(downs, dim=-2)
        return (up, down) if up.shape[-1] <= min(up.shape[-2], down.shape[-1]) else full(up @ down)


def lora_of(layer: Target, factors: Factors, dtype: torch.dtype) -> Branch:
    """The branch of LoRA at a layer that adds the product of two factors."""
    method = LoRA(rank=factors[0].shape[-1])
    # Made without memory at first: what it would be initialised with is of no use.
    branch = build(method, weight_spec(layer, method, "meta", dtype), {})
    branch.to_empty(device=factors[0].device).requires_grad_(False)
    for own, factor in zip(method.file_tensors(branch).values(), reversed(factors), strict=True):  # A is first.
        own.copy_(factor.reshape(own.shape))
    return branch


def _sites(model: nn.Module, weights: Mapping[str, float]) -> list[_Site]:
    """Every weight that any of the patches adapts, in the order of the model."""
    sources: dict[tuple[int, str], list[tuple[Branch, float]]] = {}
    for name, weight in weights.items():
        for place in find(model, name).places:
            if not place.branch.method.additive:
                raise AdapterError(
                    f"{name!r} cannot be combined: at {place.path}, what {type(place.branch.method).__name__} changes"
                    " is no update that could be added to another. Use the patches side by side."
                )
            sources.setdefault((id(place.target), place.branch.parameter), []).append((place.branch, float(weight)))
    here = {(id(layer.module), layer.parameter): layer for layer in all_targets(model)}
    for key, ((branch, _), *_) in sources.items():
        if key not in here:
            raise PatchStateError(f"The patch {branch.switch.name!r} has a layer that is not in this model: eject it.")
    sites = []
    for layer in (layer for key, layer in here.items() if key in sources):
        found = sources[id(layer.module), layer.parameter]
        matrix = LoRA().matrix(layer.module, layer.parameter)
        if matrix is None:
            raise AdapterError(
                f"{found[0][0].switch.name!r} cannot be combined: at {layer.path} there is no matrix, which a LoRA"
                " could change. Use the patches side by side."
            )
        sites.append(_Site(layer, found, matrix))
    return sites


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
"""What is computed on full matrices, by the name of `how`."""
