"""Arguments and options that several commands share, and their checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    import weights

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")

FORMATS = ("peft", "diffusers", "lycoris", "kohya", "mlx", "fluxion")
_OTHERS = (".bin", ".ckpt", ".gguf", ".json", ".pt", ".pth")
DTYPES = ("float16", "bfloat16", "float32")


class Source(click.ParamType):  # type: ignore[type-arg]  # Older versions of click have none.
    """Path, or place on the Hub. A shell completes paths."""

    name = "source"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:  # Python would read it as the current folder; more likely a shell variable is unset.
            self.fail("It is empty: give a path, or a place on the Hub.", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


def check_new(path: Path) -> None:
    """Refuse a destination that exists, or a folder named like a file of another format."""
    from weights.disk.atomic import tidy

    if path.suffix in _OTHERS:
        raise click.ClickException(f"{path} has the name of a {path.suffix} file: only .safetensors are written.")
    tidy(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise click.ClickException(f"{path} is there already: choose another destination, or remove it first.")


def of_component(source: str, adapter: weights.AdapterFile, name: str) -> weights.AdapterFile:
    """The part of an adapter for one component of a pipeline; an adapter without components is assigned to it."""
    if not adapter.components:
        at = {path: f"{name}.{path}" if path else path for path in adapter.layers}
        layers = {at[path]: layer for path, layer in adapter.layers.items()}
        aliases = {at[path]: others for path, others in adapter.aliases.items()}
        return replace(adapter, layers=layers, components=(name,), aliases=aliases)
    layers = {path: layer for path, layer in adapter.layers.items() if adapter.component_of(path)[0] == name}
    if not layers:
        parts = ", ".join(adapter.components)
        raise click.ClickException(f"{source} has nothing for {name!r}: its components are {parts}.")
    counted = {name: adapter.counted[name]} if name in adapter.counted else {}
    return replace(adapter, layers=layers, components=(name,), counted=counted)


def scaled(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """Sources of adapters and their scales, by default 1."""
    found: list[tuple[str, float]] = []
    for value in values:
        source, equals, scale = value.rpartition("=")
        if not equals or Path(value).exists():
            found.append((value, 1.0))
            continue
        try:
            found.append((source, float(scale)))
        except ValueError:
            raise click.BadParameter(f"{scale!r} is not a number: write SOURCE=SCALE, such as style=0.7.") from None
    return found


rank = click.option("--rank", type=click.IntRange(1), metavar="N", help="The largest rank at a layer.")
energy = click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="The share of each update's energy (squared norm) to keep, such as 0.95, at the lowest rank.",
)
base = click.option(
    "--base", metavar="MODEL", help="The base model, where the files do not suffice: its names and shapes are read."
)


def _canonical(format: str | None) -> str | None:
    """The canonical name of a format, of which kohya, for one, is an alias."""
    if format is None:
        return None
    from weights.formats import canonical

    return canonical(format)


to = click.option(
    "--to",
    "form",
    type=click.Choice(FORMATS),
    callback=lambda context, option, name: _canonical(name),
    help="The format to write; kohya is lycoris.  [default: peft if it can hold the adapter, otherwise fluxion]",
)


def need_size(rank: int | None, energy: float | None) -> None:
    """Refuse a call with neither rank nor energy."""
    if rank is None and energy is None:
        raise click.UsageError("Give the size of the adapter: --rank 32, or --energy 0.95.")
