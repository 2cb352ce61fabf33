"""Real handwritten digits, upright and in two shifted domains.

The 1797 images are the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository (1998), https://doi.org/10.24432/C50P49, licensed CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), as carried by scikit-learn. Only the container was changed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from types import MappingProxyType

import torch

import weights

FILE_NAME = "digits.safetensors"
TEST_SIZE = 397


@dataclass(frozen=True)
class Digits:
    """Images float32 (N, 1, 8, 8) in 0..1, labels int64 (N,) in 0..9; 1400 to train on, 397 to test on."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_digits() -> Digits:
    """Read the packaged digits. The test split is the end of the file, in the order it was published.

    Neighbours in the file resemble each other, so a contiguous tail is a harder test than a random sample.
    """
    with as_file(files(__package__) / FILE_NAME) as path:
        tensors = dict(weights.open(path))
    images = tensors["images"].unsqueeze(1).float() / 16  # stored as uint8 (1797, 8, 8), 0..16
    labels = tensors["labels"].long()
    return Digits(images[:-TEST_SIZE], labels[:-TEST_SIZE], images[-TEST_SIZE:], labels[-TEST_SIZE:])


def upright(images: torch.Tensor) -> torch.Tensor:
    """The images (..., H, W) as they are."""
    return images


def rotated(images: torch.Tensor) -> torch.Tensor:
    """The images (..., H, W) turned 90 degrees counterclockwise: (..., W, H)."""
    return torch.rot90(images, dims=(-2, -1))


def mirrored(images: torch.Tensor) -> torch.Tensor:
    """The images (..., H, W) as a mirror shows them, left and right swapped."""
    return images.flip(-1)


DOMAINS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {"upright": upright, "rotated": rotated, "mirrored": mirrored}
)
