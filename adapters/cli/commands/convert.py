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
@click.option("--base", metavar="MODEL", help="The base model, of which the names of the layers are taken.")
@click.option("--component", metavar="NAME", help="The model of a pipeline that is meant, such as unet.")
@click.option("--pickle", is_flag=True, help="Read a file as torch.save writes it, where there is no other.")
@click.option("--dtype", "kind", type=click.Choice(DTYPES), help="The type of the numbers.  [default: as it is]")
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
    file, which only lycoris, diffusers and fluxion have; lycoris has no folders.

    Files of kohya's scripts have names of layers without dots, and some files have those of an original model. To get
    the names of the base model, say with --base where that is: a file, a folder, also of a pipeline, or a place on the
    Hub. Nothing but the headers of its files is read.

    --component takes the part for one model out of a file for several. If the file does not say for which model it is,
    --component says so. What training wrote into the metadata is kept by lycoris only.

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
            f"{source} does not say where the names of its layers have dots: give its base model with --base, or write"
            " it --to lycoris."
        )
    if kind is not None:
        adapter = _cast(adapter, getattr(torch, kind))
    form = write_file(adapter, destination, form)
    click.echo(f"{destination}: {len(adapter.layers):,} layers in {form} format, from {adapter.format}.")


def _cast(adapter: weights.AdapterFile, to: dtype) -> weights.AdapterFile:
    """An adapter with numbers of another type."""
    layers = {
        path: replace(layer, tensors=_all_cast(layer.tensors, to, f"layer {path!r}"))
        for path, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers, shared=_all_cast(adapter.shared, to, "what all layers share"))


def _all_cast(tensors: Mapping[str, Tensor], to: dtype, where: str) -> dict[str, Tensor]:
    cast = {name: tensor.to(to) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if _infinities(tensor) > _infinities(tensors[name]):
            raise click.ClickException(f"{where} has numbers in {name} that are too large for {to}: choose another.")
    return cast


def _infinities(tensor: Tensor) -> int:
    # torch cannot tell for all types of eight bits
    return int((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isinf().sum())
