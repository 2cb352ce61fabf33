"""`fluxion extract`: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

from pathlib import Path

import click

from adapters.cli import options, reduction
from adapters.cli.console import progress_in_bytes
from adapters.cli.options import DTYPES, Source, as_json, check_new


@click.command()
@click.argument("base", type=Source())
@click.argument("tuned", type=Source())
@click.argument("destination", type=click.Path(path_type=Path))
@options.rank
@options.energy
@click.option("--targets", multiple=True, metavar="PATTERN", help="Layers to extract, by name or glob.  [default: all]")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Layers to exclude.")
@options.to
@click.option("--dtype", "kind", type=click.Choice(DTYPES), help="The dtype to write.  [default: that of TUNED]")
@click.option("--seed", type=int, default=0, show_default=True, help="The random seed.")
@as_json
def extract(
    base: str,
    tuned: str,
    destination: Path,
    rank: int | None,
    energy: float | None,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    form: str | None,
    kind: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write the difference of two checkpoints as a LoRA.

    BASE and TUNED are files, folders with a model or a pipeline, or places on the Hub. DESTINATION is a new folder, or
    the name of a new .safetensors file, for lycoris, diffusers and fluxion only.

    The difference of each layer is truncated to --rank, or to the lowest rank that keeps --energy, and its relative
    error in the Frobenius norm is printed. A few tensors at a time are in memory. Tensors that no LoRA can hold, such
    as biases and norms, are listed and left out. --targets and --exclude take patterns such as q_proj and '**.attn.*',
    and can be repeated.

    \b
    Examples:
      fluxion extract someone/model someone/tuned-model lora --rank 8
      fluxion extract someone/model someone/tuned-model smaller --energy 0.9 --rank 64 --exclude '**embeddings'
    """
    options.need_size(rank, energy)
    import torch

    import adapters

    check_new(destination)
    with progress_in_bytes("Extracting") as step:
        made = adapters.extract_files(
            base,
            tuned,
            destination,
            rank=rank,
            energy=energy,
            targets=targets or None,
            exclude=exclude or None,
            dtype=getattr(torch, kind) if kind else None,
            format=form,
            seed=seed,
            progress=step,
        )
    reduction.show(made, as_json, base=base, tuned=tuned)
