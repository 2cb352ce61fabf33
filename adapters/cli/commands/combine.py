"""`fluxion combine`: one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapters.cli import options, reduction
from adapters.cli.console import progress_in_layers
from adapters.cli.options import Source, as_json, check_new, scaled

if TYPE_CHECKING:
    from adapters.patch.combine import How

_WAYS = ("exact", "svd", "magnitude", "ties", "dare")


@click.command()
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "sources",
    multiple=True,
    required=True,
    callback=scaled,
    type=Source(),
    metavar="SOURCE[=WEIGHT]",
    help="An adapter and its weight, by default 1. Repeat it for several.",
)
@click.option("--how", type=click.Choice(_WAYS), default="exact", show_default=True, help="The way to combine.")
@options.rank
@options.energy
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="The share of each update's entries to keep, for magnitude, ties and dare.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The random seed of dare.")
@options.base
@options.to
@as_json
def combine(
    destination: Path,
    sources: list[tuple[str, float]],
    how: How,
    rank: int | None,
    energy: float | None,
    density: float | None,
    seed: int,
    base: str | None,
    form: str | None,
    as_json: bool,
) -> None:
    """Combine several adapters into one LoRA.

    Each SOURCE is a file, a folder, or a place on the Hub, with LoRA or, if the base is given, any other additive
    method. DESTINATION is a new folder, or the name of a new .safetensors file, for lycoris, diffusers and fluxion
    only.

    exact is the weighted sum: ranks add up. svd is its best approximation of --rank, or of the lowest rank that keeps
    --energy. magnitude sums the largest entries of each update; ties takes the mean of those that agree in sign; dare
    drops entries at random and rescales the others. The relative error of each layer is printed.

    \b
    Examples:
      fluxion combine both --adapter someone/style-lora=0.7 --adapter someone/style-lora=0.3
      fluxion combine few --adapter someone/style-lora --adapter both=-0.5 --how ties --density 0.3 --rank 4
    """
    import adapters

    check_new(destination)
    with progress_in_layers("Combining") as step:
        made = adapters.combine_files(
            sources,
            destination,
            base=base,
            how=how,
            rank=rank,
            energy=energy,
            density=density,
            seed=seed,
            format=form,
            progress=step,
        )
    weighted = [{"source": source, "weight": weight} for source, weight in sources]
    reduction.show(made, as_json, adapters=weighted, how=how)
