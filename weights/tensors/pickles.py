"""Pickles of tensors, as `torch.save` writes them: read only when that is asked for, and nothing but tensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from weights.adapter_file import CONFIG
from weights.errors import FileFormatError, SourceNotFoundError
from weights.tensors.open import save

FILES = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")
_ENDINGS = (".bin", ".ckpt", ".pt", ".pth")
_MOST_TIMES = 8  # as many bytes as the file has; tensors in it may share theirs


@contextmanager
def unpickled(path: Path) -> Iterator[Path]:
    """Block with a copy of the source in which the pickle, or the only one in a folder, is a safetensors file.

    Without a pickle the path itself.

    Raises:
        FileFormatError: The pickle holds anything but tensors by name, or there are several.
    """
    pickle = _pickle(path)
    if pickle is None:
        yield path
        return
    with TemporaryDirectory() as name:
        copy = save(_tensors(pickle), Path(name, pickle.stem).with_suffix(".safetensors"))
        if (config := pickle.with_name(CONFIG)).is_file():
            shutil.copyfile(config, copy.with_name(CONFIG))
        yield copy


def _pickle(path: Path) -> Path | None:
    if not path.is_dir():
        return path if path.suffix in _ENDINGS else None
    if any(path.glob("*.safetensors")):
        return None
    found = [path / name for name in FILES if (path / name).is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise FileFormatError(f"{path} holds several pickles ({names}); give the path of one of them.")
    return found[0] if found else None


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if is_zipfile(path):
            with ZipFile(path) as archive:  # torch.save compresses nothing.
                _check_size(path, sum(entry.file_size for entry in archive.infolist()), 1)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileFormatError:
        raise
    except OSError as error:
        raise SourceNotFoundError(f"{path} cannot be read: {error.strerror}; check the path.") from error
    except Exception as error:  # The unpickler raises whatever the bytes make it raise.
        raise FileFormatError(
            f"{path} is no pickle of tensors alone, or damaged ({type(error).__name__}); get it as safetensors."
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise FileFormatError(f"{path} holds more than tensors by name; get it as safetensors.")
    _check_size(path, sum(tensor.numel() * tensor.dtype.itemsize for tensor in content.values()), _MOST_TIMES)
    return content


def _check_size(path: Path, size: int, times: int) -> None:
    """Raise a FileFormatError for a small file that would fill the memory."""
    if size > times * path.stat().st_size:
        raise FileFormatError(f"{path} is a small file of {size:,} bytes of tensors; get it as safetensors.")
