"""`Patch`, a named set of adapters in one model, and the calls that make one."""

from __future__ import annotations

import contextlib
import difflib
import gc
import itertools
import tempfile
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

import weights
from adapters import folding
from adapters.adapted import Adapted, Made, base_modules, nodes
from adapters.adapter import Slot, WeakSlots, find_all_slots
from adapters.branch import Branch
from adapters.building import build_all, tied_to
from adapters.choice import finite
from adapters.errors import AdapterError, LayerMismatchError, PatchNameError, PatchStateError
from adapters.layers import buffers, is_stored
from adapters.method import Method, Site
from adapters.models import Model, Models, as_module, component_of
from adapters.pages import patch_fragment
from adapters.products import add
from adapters.quantized import is_quantized
from adapters.sharded import check_before, check_leaving, check_trained, is_sharded, once, parted, settle, whole
from adapters.targets import Layer, Pattern, Patterns, as_rules, layers, select, structure
from weights.card import CARD
from weights.errors import listed

_numbers = itertools.count()
# Held while patches come and go, and while those that are there are looked for: so nobody sees one that is half there.
_changing = threading.RLock()
# The nodes in a model keep its patches alive, and a patch may keep its model alive: neither may be kept from here.
_known: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Patch]] = WeakKeyDictionary()


@dataclass
class Place:
    """Where a branch belongs: a layer, its path and its slots. The layer and what holds it are not kept alive."""

    path: str
    branch: Branch
    layer: weakref.ref[nn.Module] | None
    slots: WeakSlots

    @classmethod
    def of(cls, layer: Layer, branch: Branch) -> Place:
        return cls(layer.paths[0], branch, weakref.ref(layer.module), WeakSlots(layer.slots))

    @property
    def node(self) -> Adapted | None:
        """The node that holds the branch, while it is injected."""
        return cast("Adapted | None", self.branch.parent)

    @property
    def target(self) -> nn.Module | None:
        """The layer, or None when it is gone."""
        if (node := self.node) is not None:
            return node.base
        return None if self.layer is None else self.layer()

    def occupied(self) -> tuple[nn.Module, list[Slot]]:
        """The layer and its slots, checked to be what they were.

        Raises:
            PatchStateError: The layer is no longer there.
        """
        layer = self.target
        slots = list(self.slots)
        if layer is None or not slots:
            raise PatchStateError(f"{self.path} is gone, with the model that the patch was made for.")
        for parent, key in slots:
            found = parent._modules.get(key)
            if (found.base if isinstance(found, Adapted) else found) is not layer:
                raise PatchStateError(f"{self.path} is not the layer any more that the patch was made for.")
        return layer, slots

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layer": None}

    def attach(self, layer: nn.Module, slots: list[Slot], name: str) -> None:
        """Put the branch beside the layer, in the node that is there or in a new one."""
        parent, key = slots[0]
        found = parent._modules[key]
        node = found if isinstance(found, Adapted) else Adapted(layer)
        node.hold(name if self.branch.parameter == "weight" else f"{name}_{self.branch.parameter}", self.branch)
        if self.branch.training != layer.training:
            self.branch.train(layer.training)
        if node is not found:
            node._occupy(slots, self.slots)

    def detach(self) -> None:
        """Take the branch out, and the node too when it was the last one."""
        if (node := self.node) is not None:
            if slots := node.slots:
                self.layer, self.slots = weakref.ref(node.base), node._outside
            node.release(self.branch)
            if slots and not node.branches:
                node._vacate(slots)


class Patch:
    """A named set of adapters in one model: what `inject` and `load` return.

    Attributes:
        name: Its name, unique in the model.
        enabled: Whether it acts where `adapters.use` does not say otherwise. Setting it takes the same time for any
            model.
        places: The layers it adapts, and its branch at each.
        skipped: What `load(..., strict=False)` has left out of a file: layers that the model does not have, and tensors
            for no layer, by their names in the file.
        errors: By path, how far `combine` is off what it stands for, where it made the patch: the relative error of
            the update, in the Frobenius norm.
    """

    def __init__(self, name: str, model: nn.Module, places: Sequence[Place], scale: float, freezes: bool) -> None:
        self.name = name
        self._scale = finite(scale, f"The scale of {name!r}")
        self.enabled = True
        self.skipped: tuple[str, ...] = ()
        self.errors: dict[str, float] = {}
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._models = model if isinstance(model, Models) else None  # Nothing else keeps it.
        self.places = list(places)
        self._freezes = freezes
        self._frozen: list[nn.Parameter] = []
        self._number = -1
        for place in places:
            place.branch.__dict__["patch"] = self  # Past nn.Module.__setattr__, which is slow.

    # What it is

    @property
    def scale(self) -> float:
        """How strongly it acts: 1 as trained, 0 not at all. Setting it takes the same time for any model.

        Raises:
            AdapterError: It is set to what is no finite number.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = finite(scale, f"The scale of {self.name!r}")

    @property
    def model(self) -> nn.Module:
        """The model this patch was made for.

        Raises:
            PatchStateError: It is gone, or not known yet.
        """
        if self._model is None:
            raise PatchStateError(
                f"The patch {self.name!r} was copied, and it is not known yet with which model: call adapters.patches"
                " with that first, or if it is in several models, with the pipeline or the table of them."
            )
        model = self._model()
        if model is None:
            raise PatchStateError(f"The model of the patch {self.name!r} is gone.")
        return model

    @property
    def targets(self) -> dict[str, nn.Module]:
        """The layers it adapts by path."""
        return {place.path: layer for place in self.places if (layer := place.target) is not None}

    @property
    def injected(self) -> bool:
        """Whether its adapters are in the model."""
        return self._number >= 0

    @property
    def merged(self) -> bool:
        """Whether the layers themselves compute it."""
        first = self.places[0]
        return first.node is not None and first.node.is_merged(first.branch)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters, named by the path of the layer and the name of the tensor; those of tied layers once."""
        self.settle_parts()
        seen: set[int] = set()
        for place in self.places:
            for name, parameter in place.branch.named_weights():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{place.path}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, for an optimizer.

        Raises:
            PatchStateError: FSDP would not average the gradients of one.
        """
        named = list(self.named_parameters())
        if self._model is not None and (model := self._model()) is not None:
            check_trained(model, named)
        return (parameter for _, parameter in named)

    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Its parameters in two groups for an optimizer, the tensors that start at zero learning faster.

        Args:
            lr: The learning rate of the others.
            ratio: How many times faster, 16 as LoRA+ proposes for B (arXiv:2402.12354).
        """
        fast = {
            id(parameter)
            for place in self.places
            for name, parameter in place.branch.named_weights()
            if name.partition(".")[0] in place.branch.method.fast
        }
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters():
            groups[id(parameter) in fast].append(parameter)
        return [{"params": groups[False], "lr": lr}, {"params": groups[True], "lr": lr * ratio}]

    def num_parameters(self) -> int:
        """How many numbers it trains, with those that several layers share once."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def _shared_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that layers share, each once."""
        common = {name for place in self.places for name in place.branch.common}
        for path, parameter in self.named_parameters():
            if (name := path.rpartition(".")[2]) in common:
                yield name, parameter

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, detached, named as in `named_parameters`, with those that are never trained."""
        return {name: tensor.detach() for name, tensor in self._named_tensors()}

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        self.settle_parts()
        seen: set[int] = set()
        for place in self.places:
            for name, tensor in (*place.branch.named_parameters(), *place.branch.named_buffers()):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{place.path}.{name}", tensor

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the values of its tensors, all or none.

        Raises:
            LayerMismatchError: Names are missing or unexpected, or a shape differs.
        """
        own = dict(self._named_tensors())
        problems = [f"missing {name}" for name in own if name not in state_dict]
        problems += [f"unexpected {name}" for name in state_dict if name not in own]
        problems += [
            f"{name} has shape {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own
            if name in state_dict and state_dict[name].shape != own[name].shape
        ]
        refuse(f"The tensors do not fit the patch {self.name!r}", problems)
        merged = self.merged
        if merged:
            self.unmerge()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(parted(state_dict[name], parameter))
        if merged:
            self.merge()

    def settle_parts(self) -> None:
        if self._model is not None and (model := self._model()) is not None:
            settle(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_models": None}

    def _settle(self, model: nn.Module, here: Collection[Adapted]) -> None:
        """Make a model its own if all of its adapters are here, for the patch of a copy: of the model, or a part."""
        places = [place for place in self.places if place.node is not None]
        if any(place.node not in here for place in places):
            return
        self._model, self._models = weakref.ref(model), model if isinstance(model, Models) else None
        self.places = places
        paths = {(layer.module, layer.parameter): layer.path for layer in layers(model)}
        for place in places:
            place.path = paths[cast(Adapted, place.node).base, place.branch.parameter]

    def __str__(self) -> str:
        rows = [("path", "method", "parameters")]
        for place in self.places:
            branch = place.branch
            count = sum(parameter.numel() for name, parameter in branch.named_weights() if name not in branch.common)
            rows.append((place.path, str(branch.method), f"{count:,}"))
        rows += [("all of these", name, f"{parameter.numel():,}") for name, parameter in self._shared_weights()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        state = "merged" if self.merged else "injected" if self.injected else "ejected"
        title = f"Patch {self.name!r}: {state}, scale {self.scale:g}{'' if self.enabled else ', disabled'}"
        total = f"{len(self.places)} layers, {self.num_parameters():,} parameters"
        body = (f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)
        return "\n".join([title, *body, f"  {total}"])

    def __repr__(self) -> str:
        return f"<Patch {self.name!r}, {len(self.places)} layers, {self.num_parameters():,} parameters>"

    def _repr_html_(self) -> str:
        return patch_fragment(self)

    # In and out of the model

    def inject(self) -> Patch:
        """Put its adapters back after `eject`.

        Raises:
            PatchStateError: It is injected already, or its layers are no longer in the model.
            PatchNameError: Another patch of the model has its name by now.
        """
        with _changing:
            if self.injected:
                raise PatchStateError(f"The patch {self.name!r} is injected already.")
            if not self.places:
                raise PatchStateError(f"The patch {self.name!r} has given its adapters up: load it again.")
            model = self.model
            check_name(model, self.name)
            others = patches(model)
            occupied = [(place, *place.occupied()) for place in self.places]
            self._number = next(_numbers)
            with _all_or_nothing() as undo:
                undo.callback(_known.clear)
                undo.callback(setattr, self, "_number", -1)
                undo.callback(self._detach)
                name = self.name.replace(".", "_")
                for place, layer, slots in occupied:
                    place.attach(layer, slots, f"{place.branch.method.key}_{name}")
                if self._freezes:
                    self._freeze(model)
            _known.clear()
            _known[model] = WeakValueDictionary({**others, self.name: self})  # As finding them again would show.
        return self

    def _freeze(self, model: nn.Module) -> None:
        self._frozen = [parameter for parameter in _base_parameters(model).values() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def eject(self) -> None:
        """Take its adapters out: the model is what it was before they came. A merged patch is unmerged first.

        Raises:
            PatchStateError: It is not injected.
        """
        self._require_injected()
        model = self.model
        check_leaving((place.path, node) for place in self.places if (node := place.node) is not None)
        if self.merged:
            self.unmerge()
        self._leave(model)

    def _detach(self) -> None:
        for place in reversed(self.places):
            place.detach()

    def _give_up(self) -> None:
        """Let go of its adapters after `eject`, for good and at once: it and they hold each other."""
        self.places = []

    def _leave(self, model: nn.Module) -> None:
        with _changing:
            self._take_out(model)

    def _take_out(self, model: nn.Module) -> None:
        others = {name: patch for name, patch in patches(model).items() if patch is not self}
        self._detach()
        self._number = -1
        _known.clear()
        _known[model] = WeakValueDictionary(others)
        # What it froze thaws, unless another patch still wants it frozen: then that one sees to it.
        frozen = {id(parameter): parameter for parameter in self._frozen}
        for heir in others.values():
            if heir._freezes and frozen:
                base = _base_parameters((heir._model and heir._model()) or model)
                heir._frozen += [frozen.pop(key) for key in base.keys() & frozen.keys()]
        for parameter in frozen.values():
            parameter.requires_grad_(True)
        self._frozen = []

    # In and out of the weights

    def merge(self) -> None:
        """Let the layers compute it at its present scale: no cost at run time. `unmerge` restores every bit.

        Raises:
            PatchStateError: It is not injected, merged already, or the method is no change of weights.
        """
        self._require_injected()
        self._require_mergeable()
        if self.merged:
            raise PatchStateError(f"The patch {self.name!r} is merged already.")
        self._remerge(added=True)

    def unmerge(self) -> None:
        """Undo `merge`. Every bit of the base is as before, whatever has been done to scales in between.

        Raises:
            PatchStateError: It is not merged.
        """
        if not self.merged:
            raise PatchStateError(f"The patch {self.name!r} is not merged.")
        self._remerge(added=False)

    def _remerge(self, added: bool) -> None:
        """Merge at each layer what is merged there by others, and this patch or not."""
        self.settle_parts()
        made: Made = {}
        with _all_or_nothing() as undo:
            for node, branches in self._nodes():
                before = node.merged
                ours = [(branch, self.scale) for branch in branches if added]
                node.merge([*(item for item in before if item[0].patch is not self), *ours], made=made)
                undo.callback(node.merge, before)

    def merge_and_eject(self) -> None:
        """Fold it into the base model for good, at its present scale, and leave.

        A low-rank update is added in place to a weight that one layer of the model has by itself: there is no second
        copy of the model at any time.

        Raises:
            PatchStateError: It is not injected, a weight is quantised, or computed from others and cannot be set, or
                the method is no change of weights.
        """
        self._require_injected()
        self._require_mergeable()
        model = self.model
        check_leaving((place.path, node) for place in self.places if (node := place.node) is not None)
        settle(model)
        for node, branches in self._nodes():
            names = [name for branch in branches for name in branch.names]
            if any(is_quantized(node.base._parameters.get(name)) for name in names):
                raise PatchStateError(
                    f"{node.path} is quantised, and quantising the outcome again would round it: merge into the model"
                    " it was made of and quantise that, or merge() instead, which keeps a dense weight beside."
                )
            if not all(is_stored(node.base, name) for name in names):
                raise PatchStateError(
                    f"{node.path} computes its weight from others: remove its parametrization, or merge() instead."
                )
        made: Made = {}
        replaced: dict[int, list[nn.Parameter]] = {}
        folds: list[folding.Fold] = []
        held = folding.holders(model)
        with _all_or_nothing() as undo, torch.no_grad():
            for node, branches in self._nodes():
                before, ours = node.merged, [(branch, self.scale) for branch in branches]
                if (fold := folding.fold_of(node, ours, held)) is not None:
                    folds.append(fold)
                    continue
                own = {name: node.own_weight(name) for branch in branches for name in branch.names}
                new = cast("dict[str, nn.Parameter | None]", node.folded(own, ours, made))
                node.merge([item for item in before if item[0].patch is not self], own=new, made=made)
                undo.callback(node.merge, before, own)
                for name, weight in new.items():
                    # A bias that is new thaws with the weight.
                    old = own[branches[0].parameter] if own[name] is None else own[name]
                    if weight is not None and not is_sharded(weight):
                        replaced.setdefault(id(old), []).append(weight)
            for fold in folds:  # At the very end: it cannot be undone.
                add(fold.weight, fold.products)
        for patch in patches(model).values():
            patch._frozen = [new for old in patch._frozen for new in replaced.get(id(old), [old])]
        self._leave(model)

    def _nodes(self) -> Iterator[tuple[Adapted, list[Branch]]]:
        """Each node with its branches of this patch."""
        nodes = {id(node): node for place in self.places if (node := place.node) is not None}
        for node in nodes.values():
            yield node, [branch for branch in node.branches if branch.patch is self]

    def _require_mergeable(self) -> None:
        for place in self.places:
            if not place.branch.names:
                raise PatchStateError(
                    f"{place.path} cannot be merged: {type(place.branch.method).__name__} is no change of weights."
                    " Leave the patch in the model, and switch it by `enabled` or `adapters.use`."
                )

    def _require_injected(self) -> None:
        if not self.injected:
            raise PatchStateError(f"The patch {self.name!r} is not injected: call inject() first.")

    # To files

    def adapter_file(self, component: str | None = None) -> weights.AdapterFile:
        """What a file needs to say of this patch.

        Args:
            component: What the model is called in its pipeline. By default it is found for models of diffusers, and
                for pipelines.

        Raises:
            AdapterError: A method is there with several hyperparameters, and its layers share tensors; or there are
                several models, which have their names already.
        """
        model = self.model
        settle(model)
        several = tuple(name for name, _ in model.named_children()) if isinstance(model, Models) else ()
        if component and several:
            raise AdapterError(f"component={component!r} is for one model, and the patch {self.name!r} is in several.")
        front = component_of(model) if component is None else component
        content: dict[str, weights.LayerWeights] = {}
        shared: dict[str, Tensor] = {}
        for place in self.places:
            if place.branch.tied and place.branch.method.tied_in_files:
                continue
            method, tensors = place.branch.method.saved(place.branch)
            if method.files_have_buffers and place.branch.parameter == "weight" and place.target is not None:
                tensors = {**tensors, **buffers(place.target)}
            own = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
            path = "" if method.rooted else ".".join(filter(None, (front, place.path)))
            if path in content:
                raise PatchStateError(f"A file holds one {type(method).__name__}, not another at {place.path}.")
            content[path] = weights.LayerWeights(method.key, method.hyperparameters(), own)
            for name, tensor in place.branch.shared_tensors().items():
                if shared.setdefault(name, tensor) is not tensor:
                    raise AdapterError(
                        f"The layers of the patch {self.name!r} do not all share the same {name}, and a file has one:"
                        " make a patch for each set of hyperparameters."
                    )
        shared = {name: whole(tensor.detach()) for name, tensor in shared.items()}
        return weights.AdapterFile(
            content,
            base_model=_base_model_name(model),
            base_structure=structure(model),
            shared=shared,
            task=_task(model),
            components=several or (front,) * bool(front),
        )

    def save_pretrained(
        self, path: str | PathLike[str], format: str | None = None, *, component: str | None = None
    ) -> Path:
        """Write it to files. Returns the path. Where it is in parts, all processes must call, and the first one writes.

        Args:
            path: A folder, which gets tensors, configuration and model card; or for `"lycoris"`, and if you like for
                `"diffusers"` and `"fluxion"`, a file whose name ends in `.safetensors`.
            format: `"peft"`, `"diffusers"`, `"lycoris"`, `"mlx"`, or `"fluxion"`, this library's own; by default
                PEFT's, if that can hold the patch, and else this library's.
            component: What the model is called in its pipeline, such as `"text_encoder"`, for the formats in whose
                files that stands. It is known for the UNets and transformers of diffusers.

        Raises:
            weights.WeightsError: The path cannot be written, or the format cannot hold the patch.
        """
        file = self.adapter_file(component)
        once(self.state_dict().values(), lambda: write_file(file, Path(path), format))
        return Path(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
        tags: Collection[str] = (),
        format: str | None = None,
        component: str | None = None,
        dry_run: bool = False,
    ) -> str:
        """Publish it in a repository of the Hugging Face Hub, in one commit. Returns the address of the commit.

        Where it is in parts on several processes, all must call, and the first one publishes.

        Args:
            repo_id: `"user/name"`; made if it does not exist.
            private: Whether the repository is private; by default as it is, or as the account makes new ones.
            revision: The branch to commit to, made if there is none; by default the main branch.
            create_pr: Open a pull request instead.
            token: The Hub token; by default the one `hf auth login` has stored.
            commit_message: By default names the repository.
            license: The key of a license for the model card, such as `"mit"`.
            tags: More tags for the model card.
            format: As of `save_pretrained`.
            component: As of `save_pretrained`.
            dry_run: Send nothing, and return a text that says what would be sent.

        Raises:
            weights.HubError: The Hub refused or cannot be reached; nothing was published.
            weights.WeightsError: The patch cannot be saved.
        """
        file = self.adapter_file(component)

        def publish() -> str:
            with tempfile.TemporaryDirectory() as folder:
                alone = [f"{repo_id.rpartition('/')[2]}.safetensors"] if format == "lycoris" else []
                written = write_file(file, Path(folder, *alone), format)
                card = weights.model_card(file, written, repo_id=repo_id, license=license, tags=tags)
                Path(folder, CARD).write_text(card, encoding="utf-8")
                return weights.publish(
                    folder,
                    repo_id,
                    private=private,
                    revision=revision,
                    create_pr=create_pr,
                    token=token,
                    commit_message=commit_message or f"Upload {repo_id.rpartition('/')[2]}",
                    dry_run=dry_run,
                )

        return once(self.state_dict().values(), publish)


def inject(
    model: Model,
    method: Method | Mapping[Pattern, Method],
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    *,
    name: str = "default",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
    freeze_base: bool = True,
) -> Patch:
    """Put a new adapter of a method beside every layer that is targeted.

    At first nothing changes what is computed, but for methods that start at random: prompts and prefixes, VBLoRA, and
    HRA with an odd rank or `gram_schmidt`.

    Layers that share a weight have one adapter between them, also when only one of them is targeted, if they use it
    in a way that is the same to the method: an embedding and a head do for one that trains whole rows, not for LoRA.

    Args:
        model: Any module: a Chain, a torch model, a transformers or diffusers model; or several together, as a
            pipeline of diffusers or a table of modules, whose names are then in front of paths.
        method: The method, or a mapping of patterns to methods, of which a layer has the first that matches it.
        targets: Which layers: a dotted suffix of whole names (`"q_proj"`, `"attn.q_proj"`), a glob (`*` within one
            name, `**` across dots), a compiled regex (of the whole path), a type, `f(path, module) -> bool`, or a
            list of these. None means every layer the method supports, except the output head.
        exclude: Layers to leave out, chosen in the same ways.
        name: The name of the patch, unique in the model.
        scale: How strongly it acts.
        dtype: The dtype of its tensors, by default that of each layer's weight.
        device: Their device, by default that of each layer's weight.
        seed: Makes the initial values the same each time, without touching torch's generators.
        freeze_base: Turn `requires_grad` off for the parameters of the base, until the patch is ejected.

    Raises:
        TargetError: A pattern matches nothing, or a layer cannot be adapted by the method.
        PatchNameError: The name is in use.
        AdapterError: The model is no module, the method no method, or another argument is of the wrong kind.
    """
    model = as_module(model)
    check_name(model, name)
    finite(scale, f"The scale of {name!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise AdapterError(f"dtype= has to be one of floating point, such as torch.float32, not {dtype!r}.")
    if not (seed is None or isinstance(seed, int)):
        raise AdapterError(f"seed= has to be an integer, not {seed!r}.")
    rules = as_rules(method, targets)
    for value in rules.values():
        if not isinstance(value, Method):
            raise AdapterError(f"{value!r} is no method: pass one with its numbers, such as LoRA(rank=8).")
    with without_collections():
        with _seeded(seed):
            chosen = select(model, rules, exclude)
            check_before((layer for layers, _ in chosen for layer in layers), trainable=True)
            places = _new_places(chosen, device, dtype)
        return Patch(name, model, places, scale, freeze_base).inject()


def _new_places(
    chosen: Sequence[tuple[list[Layer], Method]], device: torch.device | str | None, dtype: torch.dtype | None
) -> list[Place]:
    """New branches for layers, and their places."""
    sites = [Site.of(layer, method, device, dtype) for (layer, *_), method in chosen]
    for ((layer, *_), method), site in zip(chosen, sites, strict=True):
        method.check_site(site)
        method.check_training(layer.module, layer.parameter)
    branches = build_all([(method, site) for (_, method), site in zip(chosen, sites, strict=True)])
    places: list[Place] = []
    for ((layer, *tied), _), branch in zip(chosen, branches, strict=True):
        places.append(Place.of(layer, branch))
        places += [Place.of(other, tied_to(branch)) for other in tied]
    return places


def patches(model: Model) -> dict[str, Patch]:
    """The patches that are injected in a model, by name, in the order of their injection."""
    model = as_module(model)
    found = _known.get(model)
    if found is None:
        with _changing:
            found = _looked_up(model)
    return dict(found.items())


def _looked_up(model: nn.Module) -> WeakValueDictionary[str, Patch]:
    """The same, found in the model, or by another thread meanwhile."""
    found = _known.get(model)
    if found is None:
        here = dict.fromkeys(nodes(model))
        if copies := [node for node in here if not node.slots]:  # They learn where they are.
            for node, slots in find_all_slots(model, copies).items():
                node._outside = WeakSlots(slots)
        unique = {id(branch.patch): branch.patch for node in here for branch in node.branches}
        for patch in unique.values():
            if patch._model is None:
                patch._settle(model, here)
        ordered = sorted(unique.values(), key=lambda patch: patch._number)
        _known[model] = found = WeakValueDictionary((patch.name, patch) for patch in ordered)
    return found


def _base_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of the base model by id, with those that merged ones stand in for."""
    found: dict[int, nn.Parameter] = {}
    for module in base_modules(model):
        own = module.kept() if isinstance(module, Adapted) else module._parameters.values()
        found.update((id(parameter), parameter) for parameter in own if parameter is not None)
    return found


def find(model: Model, name: str) -> Patch:
    """The patch of that name in a model.

    Raises:
        PatchNameError: There is none.
    """
    return named(patches(model), name)


def named(known: Mapping[str, Patch], name: str) -> Patch:
    """The patch of that name, of those of a model by name; raises a PatchNameError where there is none."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1) or list(known)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "it has no patches."
        raise PatchNameError(f"The model has no patch {name!r}: {hint}")
    return known[name]


def check_name(model: nn.Module, name: str) -> None:
    """Raise unless a new patch of a model may have that name."""
    if not (isinstance(name, str) and name):
        raise PatchNameError(f"A patch needs a name that is a string and not empty, not {name!r}.")
    if name in patches(model):
        raise PatchNameError(f"The model has a patch {name!r} already: eject it, or choose another name=.")


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one LayerMismatchError for all problems, if there are any."""
    if problems:
        raise LayerMismatchError(f"{what}: {listed(problems)}.")


def write_file(file: weights.AdapterFile, path: Path, format: str | None) -> str:
    """Write an adapter, by default in PEFT's format, or where that cannot hold it in this library's. Returns which."""
    if format is None:
        try:
            weights.write_adapter(file, path, format="peft")
        except weights.FileFormatError:
            format = "fluxion"
        else:
            return "peft"
    weights.write_adapter(file, path, format=format)
    return format


def _base_model_name(model: nn.Module) -> str | None:
    """Where a transformers or diffusers model says it came from."""
    for holder in (model, getattr(model, "config", None)):
        name = getattr(holder, "name_or_path", None) or getattr(holder, "_name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return None


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _task(model: nn.Module) -> str | None:
    """What a transformers model is for, by the end of its class's name."""
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """In this block Python does not look for cycles: what it would look through are the many objects made here."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[contextlib.ExitStack]:
    """Callbacks registered in this block are run, the last one first, when it raises."""
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
