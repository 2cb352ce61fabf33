"""`fluxion report`: a page on one adapter, or on several and their overlap."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from adapters.cli.console import megabytes, print_json, progress_in_layers
from adapters.cli.options import Source, as_json


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", type=Source())
@click.option(
    "--base",
    type=Source(),
    metavar="MODEL",
    help="The base model, for the fit and for sizes relative to its weights.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
@as_json
def report(sources: tuple[str, ...], base: str | None, output: Path, as_json: bool) -> None:
    """Measure adapters: the size and rank of each update, and their overlap.

    Each SOURCE is an adapter: a file, a folder, or a place on the Hub. The page is one HTML file that works without a
    network: a tree of the layers with the size of each update, singular values and effective ranks, the overlap of
    several adapters, and with --base which layers would load into it.

    An existing report is replaced, any other file is not. --json prints the facts and writes no page.

    \b
    Examples:
      fluxion report style.safetensors
      fluxion report someone/style-lora style.safetensors --base someone/model --output both.html
    """
    from adapters.reports.html import check_charts
    from adapters.reports.report import report

    if not as_json:
        _check(output)
        check_charts()
    with progress_in_layers("Measuring") as step:
        found = report(sources, base, progress=step)
    if as_json:
        print_json(asdict(found))
        return
    found.save(output)
    what = "adapter" if len(sources) == 1 else "adapters"
    layers = sum(len(one.layers) for one in found.adapters)
    click.echo(f"{output}: {len(sources)} {what}, {layers:,} layers, {megabytes(output.stat().st_size)}.")


def _check(path: Path) -> None:
    """Refuse an output that is not a page, or exists and is not a report."""
    from adapters.reports.html import is_page

    if path.suffix not in (".html", ".htm"):
        raise click.ClickException(f"{path} is not the name of a page: end it with .html.")
    if path.exists() and not is_page(path):
        raise click.ClickException(f"{path} exists and is not a report: choose another --output.")
