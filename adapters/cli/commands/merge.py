"""`fluxion merge`: adapters merged into a checkpoint, from disk to disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters.cli.console import megabytes, print_json, progress_in_bytes
from adapters.cli.options import DTYPES, Source, as_json, check_new, of_component

if TYPE_CHECKING:
    import weights

from adapters.cli.options import scaled

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kMGT]?B)", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def _bytes(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Number of bytes of a size such as 5GB."""
    if value is None:
        return None
    size = _SIZE.fullmatch(value.strip())
    if size is None or float(size[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size: write it as 500MB or 5GB.")
    return int(float(size[1]) * _UNITS[size[2].lower()])


@click.command()
@click.argument("base", type=Source())
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "sources",
    multiple=True,
    required=True,
    callback=scaled,
    type=Source(),
    metavar="SOURCE[=SCALE]",
    help="An adapter and its scale, by default 1. Repeat it for several, in their order.",
)
@click.option("--component", metavar="NAME", help="The component of a pipeline, such as unet.")
@click.option("--dtype", "kind", type=click.Choice(DTYPES), help="The dtype to write.  [default: that of the base]")
@click.option(
    "--max-shard-size",
    "most",
    callback=_bytes,
    metavar="SIZE",
    help="The largest size of a file, such as 5GB.  [default: the files of the base]",
)
@as_json
def merge(
    base: str,
    destination: Path,
    sources: list[tuple[str, float]],
    component: str | None,
    kind: str | None,
    most: int | None,
    as_json: bool,
) -> None:
    """Merge adapters into a checkpoint, without building the model.

    BASE is a file, a folder with a model or a pipeline, or a place on the Hub. DESTINATION is a new folder, where its
    settings and its tokenizer go too, so that it can be loaded as the base can; or the name of a new .safetensors file.

    A few tensors at a time are in memory. If it is interrupted, the same command resumes. The destination appears when
    it is complete.

    --component selects the part of the adapters for one component of a pipeline, or assigns adapters without components
    to it.

    \b
    Examples:
      fluxion merge someone/model merged --adapter someone/style-lora=0.7
      fluxion merge someone/model both.safetensors --adapter style.safetensors --adapter someone/style-lora=-0.3
    """
    import torch

    import adapters
    import weights

    check_new(destination)
    read: list[tuple[str | weights.AdapterFile, float]] = [*sources]
    if component is not None:
        read = [(of_component(source, weights.read_adapter(source), component), scale) for source, scale in sources]
    try:
        with progress_in_bytes("Merging") as step:
            adapters.merge_files(
                base,
                read,
                destination,
                dtype=getattr(torch, kind) if kind else None,
                max_shard_size=most,
                progress=step,
            )
    except KeyboardInterrupt:
        click.echo("The same command resumes from here.", err=True)
        raise
    files = [destination] if destination.is_file() else sorted(destination.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if as_json:
        merged = [{"source": source, "scale": scale} for source, scale in sources]
        said = {"destination": str(destination), "base": base, "adapters": merged, "files": len(files), "bytes": size}
        print_json(said)
    else:
        what = "adapter" if len(sources) == 1 else "adapters"
        click.echo(f"{destination}: {megabytes(size)}, with {len(sources)} {what} merged.")
