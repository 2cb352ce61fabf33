"""`fluxion convert`: an adapter in another format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters.cli.options import Source

if TYPE_CHECKING:
    from torch import Tensor, dtype

    import weights

from adapters.cli.options import DTYPES, check_new, of_component, to


@click.command()
@click.argument("source", type=Source())
@click.argument("destination", type=click.Path(path_type=Path))
@to
@click.option("--base", metavar="MODEL", help="The base model, for the names of the layers.")
@click.option("--component", metavar="NAME", help="The component of a pipeline, such as unet.")
@click.option("--pickle", is_flag=True, help="Read a file of torch.save, if there is no other.")
@click.option("--dtype", "kind", type=click.Choice(DTYPES), help="The dtype to write.  [default: that of SOURCE]")
def convert(
    source: str,
    destination: Path,
    form: str | None,
    base: str | None,
    component: str | None,
    pickle: bool,
    kind: str | None,
) -> None:
    """Write an adapter in another format.

    SOURCE is a file, a folder, or a place on the Hub. DESTINATION is a new folder, or the name of a new .safetensors
    file, for lycoris (also called kohya), diffusers and fluxion only; lycoris has no folders.

    kohya's files have layer names without dots, and some files have the names of an original model. To get the names of
    the base model, give it with --base: a file, a folder, also of a pipeline, or a place on the Hub. Only the headers
    of its files are read.

    --component selects the part of a file for one component of a pipeline, or assigns a file without components to it.
    Only lycoris keeps the training metadata.

    \b
    Examples:
      fluxion convert style.safetensors out --base someone/model
      fluxion convert out half.safetensors --dtype float16
    """
    import torch

    import weights
    from adapters.patch.save import write_file

    check_new(destination)
    adapter = weights.read_adapter(source, pickle=pickle)
    if component is not None:
        adapter = of_component(source, adapter, component)
    if base is not None and not adapter.counted:
        from adapters.files.checkpoint import Checkpoint
        from adapters.files.resolve.rename import with_base_paths

        checkpoint = Checkpoint.open(base)
        adapter = with_base_paths(checkpoint.index, checkpoint.parts, adapter)
        adapter = replace(adapter, base_model=adapter.base_model or base)
    elif adapter.flattened and form != "lycoris":
        raise click.ClickException(
            f"The layer names in {source} have no dots: give its base model with --base, or write it --to lycoris."
        )
    if kind is not None:
        adapter = _cast(adapter, getattr(torch, kind))
    form = write_file(adapter, destination, form)
    click.echo(f"{destination}: {len(adapter.layers):,} layers in {form} format, from {adapter.format}.")


def _cast(adapter: weights.AdapterFile, to: dtype) -> weights.AdapterFile:
    """Adapter whose tensors have another dtype."""
    layers = {
        path: replace(layer, tensors=_all_cast(layer.tensors, to, f"layer {path!r}"))
        for path, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers, shared=_all_cast(adapter.shared, to, "the shared tensors"))


def _all_cast(tensors: Mapping[str, Tensor], to: dtype, where: str) -> dict[str, Tensor]:
    cast = {name: tensor.to(to) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if _infinities(tensor) > _infinities(tensors[name]):
            raise click.ClickException(f"{name} of {where} has values too large for {to}: choose another dtype.")
    return cast


def _infinities(tensor: Tensor) -> int:
    # torch cannot tell for all types of eight bits
    return int((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isinf().sum())
