"""`Patch`, a named set of adapters in one model, and the calls that make one."""

from __future__ import annotations

import difflib
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

import weights
from adapters.adapter import base_modules
from adapters.errors import AdapterError, PatchNameError, PatchStateError, refuse
from adapters.layers.kinds import buffers
from adapters.layers.quantized import is_quantized
from adapters.layers.sharded import (
    check_leaving,
    check_trained,
    gather,
    is_sharded,
    on_rank_zero,
    reshard,
    shard_like,
)
from adapters.layers.weight import is_stored
from adapters.lowrank.accumulate import add
from adapters.methods.core.method import Branch
from adapters.patch import merge_in_place as folding
from adapters.patch.attachment import Attachment
from adapters.patch.notebook import as_html
from adapters.patch.registry import Registered, _changing, _known, _numbers, check_name, registered
from adapters.patch.save import _base_model_name, _task, write_file
from adapters.patch.transaction import _all_or_nothing
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.runtime.merged_weights import Made
from adapters.targets.models import Model, Models, as_module, component_of
from adapters.targets.target import all_targets, structure
from weights.hub.card import CARD


class Patch(Registered):
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

    def __init__(self, name: str, model: nn.Module, places: Sequence[Attachment], scale: float, freezes: bool) -> None:
        super().__init__(name, scale)
        self.skipped: tuple[str, ...] = ()
        self.errors: dict[str, float] = {}
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._models = model if isinstance(model, Models) else None  # Nothing else keeps it.
        self.places = list(places)
        self._freezes = freezes
        self._frozen: list[nn.Parameter] = []
        self.number = -1
        for place in places:
            place.branch.__dict__["switch"] = self  # Past nn.Module.__setattr__, which is slow.

    # What it is

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

    def path_of(self, branch: object) -> str:
        return next((place.path for place in self.places if place.branch is branch), "")

    @property
    def targets(self) -> dict[str, nn.Module]:
        """The layers it adapts by path."""
        return {place.path: layer for place in self.places if (layer := place.target) is not None}

    @property
    def injected(self) -> bool:
        """Whether its adapters are in the model."""
        return self.number >= 0

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
        plus_lr = {
            id(parameter)
            for place in self.places
            for name, parameter in place.branch.named_weights()
            if name.partition(".")[0] in place.branch.method.plus_lr
        }
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters():
            groups[id(parameter) in plus_lr].append(parameter)
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
                parameter.copy_(shard_like(state_dict[name], parameter))
        if merged:
            self.merge()

    def settle_parts(self) -> None:
        if self._model is not None and (model := self._model()) is not None:
            reshard(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_models": None}

    def settle(self, model: nn.Module, here: Collection[AdaptedLayer]) -> None:
        places = [place for place in self.places if place.node is not None]
        if any(place.node not in here for place in places):
            return
        self._model, self._models = weakref.ref(model), model if isinstance(model, Models) else None
        self.places = places
        paths = {(layer.module, layer.parameter): layer.path for layer in all_targets(model)}
        for place in places:
            place.path = paths[cast(AdaptedLayer, place.node).base, place.branch.parameter]

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
        return as_html(str(self))

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
            self.number = next(_numbers)
            with _all_or_nothing() as undo:
                undo.callback(_known.clear)
                undo.callback(setattr, self, "number", -1)
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
        self.number = -1
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
                node.merge([*(item for item in before if item[0].switch is not self), *ours], made=made)
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
        reshard(model)
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
                node.merge([item for item in before if item[0].switch is not self], own=new, made=made)
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

    def _nodes(self) -> Iterator[tuple[AdaptedLayer, list[Branch]]]:
        """Each node with its branches of this patch."""
        nodes = {id(node): node for place in self.places if (node := place.node) is not None}
        for node in nodes.values():
            yield node, [branch for branch in node.branches if branch.switch is self]

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
        reshard(model)
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
            own = {name: gather(tensor.detach()) for name, tensor in tensors.items()}
            path = "" if method.whole_model else ".".join(filter(None, (front, place.path)))
            if path in content:
                raise PatchStateError(f"A file holds one {type(method).__name__}, not another at {place.path}.")
            content[path] = weights.LayerWeights(method.key, method.hyperparameters(), own)
            for name, tensor in place.branch.shared_tensors().items():
                if shared.setdefault(name, tensor) is not tensor:
                    raise AdapterError(
                        f"The layers of the patch {self.name!r} do not all share the same {name}, and a file has one:"
                        " make a patch for each set of hyperparameters."
                    )
        shared = {name: gather(tensor.detach()) for name, tensor in shared.items()}
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
        on_rank_zero(self.state_dict().values(), lambda: write_file(file, Path(path), format))
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

        return on_rank_zero(self.state_dict().values(), publish)


def patches(model: Model) -> dict[str, Patch]:
    """The patches that are injected in a model, by name, in the order of their injection."""
    return cast("dict[str, Patch]", registered(as_module(model)))


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


def _base_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of the base model by id, with those that merged ones stand in for."""
    found: dict[int, nn.Parameter] = {}
    for module in base_modules(model):
        own = module.kept() if isinstance(module, AdaptedLayer) else module._parameters.values()
        found.update((id(parameter), parameter) for parameter in own if parameter is not None)
    return found
