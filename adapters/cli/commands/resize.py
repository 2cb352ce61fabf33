"""`fluxion resize`: an adapter of lower rank."""

from __future__ import annotations

from pathlib import Path

import click

from adapters.cli import options, reduction
from adapters.cli.console import progress_in_layers
from adapters.cli.options import Source, as_json, check_new


@click.command()
@click.argument("source", type=Source())
@click.argument("destination", type=click.Path(path_type=Path))
@options.rank
@options.energy
@options.base
@options.to
@as_json
def resize(
    source: str,
    destination: Path,
    rank: int | None,
    energy: float | None,
    base: str | None,
    form: str | None,
    as_json: bool,
) -> None:
    """Write the best LoRA of lower rank for an adapter, layer by layer.

    SOURCE is a file, a folder, or a place on the Hub, with LoRA or, if the base is given, any other additive method.
    DESTINATION is a new folder, or the name of a new .safetensors file, for lycoris, diffusers and fluxion only. The
    relative error of each layer is printed, in the Frobenius norm.

    kohya's files have layer names without dots. Without the base they stay so, in a .safetensors file.

    \b
    Examples:
      fluxion resize someone/style-lora smaller --rank 2
      fluxion resize style.safetensors small.safetensors --energy 0.95
    """
    options.need_size(rank, energy)
    import adapters

    check_new(destination)
    with progress_in_layers("Resizing") as step:
        made = adapters.resize_file(
            source, destination, rank=rank, energy=energy, base=base, format=form, progress=step
        )
    reduction.show(made, as_json, source=source)
