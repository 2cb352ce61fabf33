"""What writes files or sends them, from a known old state to a known new one. Another one is one line in the table."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants

import adapters
import weights
from adapters.cli import main
from tests.faults.hub import Hub
from tests.weights.hub_server import WRITER
from weights.disk.atomic import settle
from weights.formats import writable

State = Mapping[str, bytes]
_PART = ".*.part"  # a merge, which the same call goes on with


def files_in(folder: Path) -> State:
    """The files that are not hidden, by name, as they are after a reader has looked there."""
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        settle(place)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path: path.relative_to(folder) for path in paths}
    return {
        name.as_posix(): path.read_bytes()
        for path, name in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


@dataclass(frozen=True)
class Operation:
    """Something that is done in a folder, which is copied from a template before.

    Attributes:
        name: What it is called in the table.
        run: Does it, given the template's copy.
        prepare: Makes the template. What is read is in `source`, what is written in `out`.
        reset: Does besides what has to be done before each run.
        state: What there is to be seen of what is written.
        together: Whether files are all old or all new, and not each of them by itself.
        once: Whether it is refused where the new state is there already.
        leaves: The pattern of what may be hidden there after a run that was not cut off.
    """

    name: str
    run: Callable[[Path], object]
    prepare: Callable[[Path], object]
    reset: Callable[[], object] = lambda: None
    state: Callable[[Path], State] = field(default=lambda place: files_in(place / "out"))
    together: bool = True
    once: bool = False
    leaves: str = ""


def lora(value: float) -> weights.AdapterFile:
    """An adapter of which no file is that of another value: the numbers in the settings differ too."""
    rank = 2 + int(value)
    tensors = {"lora_A": torch.full((rank, 64), value), "lora_B": torch.full((48, rank), value)}
    layer = weights.LayerWeights("lora", {"rank": rank, "alpha": 2.0 * value, "dropout": 0.0, "rslora": False}, tensors)
    return weights.AdapterFile({f"layers.{number}.fc": layer for number in range(3)})


def saved(place: Path, format: str, value: float) -> object:
    name = "out/adapter.safetensors" if format == "lycoris" else "out"
    (place / "out").mkdir(exist_ok=True)
    return weights.write_adapter(lora(value), place / name, format)


def model(place: Path) -> None:
    """A checkpoint in two files and an adapter for it, and what is there already where it is merged to."""
    torch.default_generator.manual_seed(0)
    tensors = {f"layers.{number}.fc.weight": torch.randn(48, 64) for number in range(3)}
    tensors |= {"embed.weight": torch.randn(100, 64)}
    weights.save(tensors, place / "all" / "model.safetensors")
    (place / "all" / "config.json").write_text(json.dumps({"dtype": "float32"}))
    (place / "all" / "tokenizer.json").write_text("{}")
    weights.rewrite(place / "all", place / "source" / "base", {}, max_shard_size=24_000)
    weights.write_adapter(lora(2.0), place / "source" / "style")
    shutil.rmtree(place / "all")
    weights.save({"old": torch.ones(3)}, place / "out" / "merged.safetensors")


def merged(place: Path, name: str, **options: int) -> object:
    source = place / "source"
    return adapters.merge_files(source / "base", {source / "style": 0.5}, place / "out" / name, **options)


def tuned(place: Path) -> None:
    """A checkpoint, another that was made of it, and what is there already where their difference goes."""
    model(place)
    source = place / "source"
    adapters.merge_files(source / "base", {source / "style": 1.0}, source / "tuned")
    weights.write_adapter(lora(1.0), place / "out" / "adapter")


def extracted(place: Path) -> object:
    return adapters.extract_files(
        place / "source" / "base", place / "source" / "tuned", place / "out" / "adapter", rank=2
    )


def command(*arguments: object) -> None:
    with redirect_stdout(io.StringIO()):
        main.main([str(argument) for argument in arguments], standalone_mode=False)


def operations(hub: Hub) -> list[Operation]:
    """The table."""

    def served(place: Path) -> None:
        saved(place, "peft", 1.0)
        weights.write_adapter(lora(2.0), place / "source")

    def cached(place: Path) -> State:
        """The files of snapshots in the client's cache, each whole if it is there."""
        folders = (place / "out").glob("models--me--style/snapshots/*")
        return {name: content for folder in folders for name, content in files_in(folder).items()}

    def downloaded(place: Path) -> None:
        with in_cache(place / "out"):
            weights.download("me/style", token=WRITER)

    def pulled(place: Path) -> None:
        with in_cache(place / "cache"):
            command("pull", "me/style", place / "out")

    def published(place: Path) -> None:
        with in_cache(place / "cache"):
            weights.publish(place / "source", "me/new", token=WRITER)

    def converted(place: Path) -> None:
        command("convert", place / "source", place / "out" / "converted", "--to", "fluxion")

    return [
        Operation(
            "save",
            lambda place: weights.save({"a": torch.full((5_000,), 2.0)}, place / "out" / "a.safetensors"),
            lambda place: weights.save({"a": torch.full((5_000,), 1.0)}, place / "out" / "a.safetensors"),
        ),
        *(
            Operation(
                f"save an adapter as {format}",
                lambda place, format=format: saved(place, format, 2.0),  # type: ignore[misc]
                lambda place, format=format: saved(place, format, 1.0),  # type: ignore[misc]
            )
            for format in writable()
        ),
        Operation("convert", converted, lambda place: weights.write_adapter(lora(2.0), place / "source"), once=True),
        Operation("merge into a file", lambda place: merged(place, "merged.safetensors"), model, leaves=_PART),
        Operation(
            "merge into a folder",
            lambda place: merged(place, "m", max_shard_size=30_000),
            model,
            once=True,
            leaves=".*.part",
        ),
        Operation("extract", extracted, tuned),
        Operation("download", downloaded, served, hub.serve, cached, together=False),
        Operation("pull into a folder", pulled, served, hub.serve),
        Operation("publish", published, served, hub.clear, lambda place: hub.published()),
    ]


class in_cache:
    """A block in which the Hub's client has its cache in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.before = constants.HF_HUB_CACHE
        constants.HF_HUB_CACHE = str(self.folder)

    def __exit__(self, *_: object) -> None:
        constants.HF_HUB_CACHE = self.before
