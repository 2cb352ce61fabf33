"""Writing the files of an adapter, with a model card beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from weights.adapter_file import AdapterFile
from weights.disk.atomic import write_files
from weights.hub.card import CARD, model_card

Chunks = Iterable[bytes | memoryview]


def write_folder(path: Path, files: Mapping[str, Chunks], adapter: AdapterFile, format: str) -> None:
    """Write the files of a folder together, with a model card, unless somebody has written one already.

    Raises:
        FileWriteError: The system refused to write.
    """
    contents = {path / name: chunks for name, chunks in files.items()}
    if not (path / CARD).exists():
        contents[path / CARD] = [model_card(adapter, format).encode()]
    write_files(contents)


def write_file(path: Path, name: str, chunks: Chunks, adapter: AdapterFile, format: str) -> None:
    """Write a single file, at the path if that ends as files of tensors do, and else in the folder there, with a card.

    Raises:
        FileWriteError: The system refused to write.
    """
    if path.suffix == ".safetensors":
        write_files({path: chunks})
    else:
        write_folder(path, {name: chunks}, adapter, format)
