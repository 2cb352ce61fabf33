"""`Patch`, a named set of branches in one model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

import weights
from adapters.layers.sharded import check_trained
from adapters.patch import merge, parameters, printing, save, surgery
from adapters.patch.attachment import Attachment
from adapters.patch.notebook import as_html
from adapters.patch.record import PatchRecord
from adapters.patch.registry import named, registered
from adapters.patch.save import Format
from adapters.targets.models import Model, as_module


class Patch(PatchRecord):
    """A named set of branches in one model, which others call an adapter: what `inject` and `load` return.

    Attributes:
        name: Its name, unique in the model.
        enabled: Whether it acts where `adapters.use` does not say otherwise. Setting it takes the same time for any
            model.
        attachments: Its branches, and the layer of each.
        skipped: What `load(..., strict=False)` has left out of a file: layers that the model does not have, and tensors
            for no layer, by their names in the file.
        errors: Relative error of the update at each path, in the Frobenius norm, if `combine` made the patch.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4), name="style")
        >>> patch.scale = 0.5
        >>> print(patch)  # a table of its layers
    """

    def __init__(
        self, name: str, model: nn.Module, attachments: Sequence[Attachment], scale: float, freezes: bool
    ) -> None:
        super().__init__(name, model, attachments, scale, freezes)
        self.skipped: tuple[str, ...] = ()
        self.errors: dict[str, float] = {}

    @property
    def targets(self) -> dict[str, nn.Module]:
        """The layers it adapts by path."""
        return {one.path: layer for one in self.attachments if (layer := one.target) is not None}

    @property
    def merged(self) -> bool:
        """Whether all of its layers compute it in their weights."""
        return merge.is_merged(self)

    def __str__(self) -> str:
        return printing.table(self)

    def __repr__(self) -> str:
        return printing.line(self)

    def _repr_html_(self) -> str:
        return as_html(str(self))

    # Its tensors

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters, named by the path of the layer and the name of the tensor; those of tied layers once."""
        return parameters.named_weights(self)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, for an optimizer.

        Raises:
            PatchStateError: FSDP would not average the gradients of one.
        """
        trained = list(self.named_parameters())
        if (model := self.bound_model) is not None:
            check_trained(model, trained)
        return (parameter for _, parameter in trained)

    def parameter_groups(self, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
        """Its parameters in two groups for an optimizer, the tensors that start at zero learning faster.

        Args:
            lr: The learning rate of the others.
            ratio: How many times faster, 16 as LoRA+ proposes for B (arXiv:2402.12354).
        """
        return parameters.groups(self, self.parameters(), lr, ratio)

    def num_parameters(self) -> int:
        """The number of values it trains, with those that several layers share counted once."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors, detached, named as in `named_parameters`, with those that are never trained."""
        return {name: tensor.detach() for name, tensor in parameters.named_tensors(self)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the values of its tensors, all or none. Where it is merged, it stays so, with the new values.

        Raises:
            PatchStateError: It is evicted.
            LayerMismatchError: Names are missing or unexpected, or a shape differs.
        """
        parameters.replace_tensors(self, state_dict)

    # In and out of the model

    def inject(self) -> Patch:
        """Put its branches back after `eject`.

        Raises:
            PatchStateError: It is injected already, or its layers are no longer in the model.
            PatchNameError: Another patch of the model has its name by now.
        """
        surgery.enter(self)
        return self

    def eject(self) -> None:
        """Take its branches out: the model is what it was before they came. A merged patch is unmerged first.

        Raises:
            PatchStateError: It is not injected.
        """
        merge.unmerge_and_leave(self)

    # In and out of the weights

    def merge(self) -> None:
        """Compute it in the weights of its layers, at its present scale and at no cost. `unmerge` restores every bit.

        Raises:
            PatchStateError: It is not injected, merged already, or its method cannot be merged.
        """
        merge.merge(self)

    def unmerge(self) -> None:
        """Undo `merge`. Every bit of the base is as before, whatever has been done to scales in between.

        Raises:
            PatchStateError: It is not merged.
        """
        merge.unmerge(self)

    def merge_and_eject(self) -> None:
        """Merge it into the base model for good, at its present scale, and leave.

        A low-rank update is added in place to a weight that one layer of the model has by itself: there is no second
        copy of the model at any time.

        Raises:
            PatchStateError: It is not injected, a weight is quantized, or computed from others and cannot be set, or
                its method cannot be merged.
        """
        merge.merge_for_good(self)

    # To files

    def adapter_file(self, component: str | None = None) -> weights.AdapterFile:
        """The content of a file of this patch.

        Args:
            component: The name of the model in its pipeline. By default it is found for models of diffusers, and for
                pipelines.

        Raises:
            PatchStateError: It is evicted, or a file cannot hold two of its branches side by side.
            AdapterError: A method is there with several hyperparameters, and its layers share tensors; or there are
                several models, which have their names already.
        """
        return save.adapter_file(self, component)

    def save_pretrained(
        self, path: str | PathLike[str], format: Format | str | None = None, *, component: str | None = None
    ) -> Path:
        """Write it to files. Where it is sharded, all processes have to call, and the first one writes.

        Args:
            path: A folder, which gets tensors, configuration and model card; or for `"lycoris"`, and if you like for
                `"diffusers"` and `"fluxion"`, a file whose name ends in `.safetensors`.
            format: `"peft"`, `"diffusers"`, `"lycoris"`, `"mlx"`, or `"fluxion"`, this library's own; by default
                PEFT's, if that can hold the patch, and else this library's.
            component: The name of the model in its pipeline, such as `"text_encoder"`, for the formats in whose files
                that stands. It is known for the UNets and transformers of diffusers.

        Returns:
            The path.

        Raises:
            weights.WeightsError: The path cannot be written, or the format cannot hold the patch.
        """
        return save.save(self, path, format, component)

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
        format: Format | str | None = None,
        component: str | None = None,
        dry_run: bool = False,
    ) -> str:
        """Publish it in a repository of the Hugging Face Hub, in one commit.

        Where it is sharded, all processes have to call, and the first one publishes.

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
            dry_run: Send nothing, and return a string that says what would be sent.

        Returns:
            The address of the commit.

        Raises:
            weights.HubError: The Hub refused or cannot be reached; nothing was published.
            weights.WeightsError: The patch cannot be saved.
        """
        return save.publish(
            self,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message,
            license=license,
            tags=tags,
            format=format,
            component=component,
            dry_run=dry_run,
        )


def patches(model: Model) -> dict[str, Patch]:
    """The patches that are injected in a model, by name, in the order of their injection.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4), name="style")
        >>> list(adapters.patches(model))
        ['style']
    """
    return cast("dict[str, Patch]", registered(as_module(model)))


def find(model: Model, name: str) -> Patch:
    """The patch of that name in a model.

    Raises:
        PatchNameError: There is none.
    """
    return named(patches(model), name)
