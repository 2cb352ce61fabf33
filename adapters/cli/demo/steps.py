"""Steps of the demo: its calls of the library, without output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adapters
from adapters.cli.demo.data import DOMAINS, Digits
from adapters.cli.demo.model import load_model

SHIFTED = ("rotated", "mirrored")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "rotated": ("rotated",),
    "mirrored": ("mirrored",),
    "both": ("rotated", "mirrored"),
}
"""The active patches in each row of the table."""

METHOD = adapters.LoRA(rank=4, alpha=8)
TRAINING_STEPS = 400
BATCH_SIZE = 64
LEARNING_RATE = 1e-2

Table = dict[str, dict[str, float]]
"""Accuracies, 0..1, by choice of patches and by domain."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Block with one thread: the number of threads changes the last bits of a sum, and so every trained number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inject(model: nn.Module, name: str) -> adapters.Patch:
    """New patch on every layer with a weight, the output head included, as a domain shift changes all of them."""
    return adapters.inject(model, METHOD, targets=[nn.Conv2d, nn.Linear], name=name, seed=SHIFTED.index(name))


def train(model: nn.Module, patch: adapters.Patch, digits: Digits) -> Iterator[float]:
    """Train a patch on the domain of its name; yields the loss of each step."""
    images, labels = DOMAINS[patch.name](digits.train_images), digits.train_labels
    optimizer = torch.optim.Adam(patch.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRAINING_STEPS):
        batch = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        with adapters.use(model, patch.name):  # Without the other patches in the model.
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images (N, 1, 8, 8) that the model, as it is now, gives their labels (N,)."""
    return (model(images).argmax(dim=1) == labels).double().mean().item()


def accuracies(model: nn.Module, digits: Digits) -> Table:
    """Accuracies of one model with each set of active patches, on every domain."""
    table: Table = {}
    for choice, names in CHOICES.items():
        with adapters.use(model, *names):
            table[choice] = {
                domain: accuracy(model, shift(digits.test_images), digits.test_labels)
                for domain, shift in DOMAINS.items()
            }
    return table


@dataclass(frozen=True)
class MixedBatch:
    """All test digits in one mixed batch, upright, rotated and mirrored by turns.

    Attributes:
        images: (N, 1, 8, 8).
        labels: (N,).
        rows: The patch that each row needs; None where it needs none.
    """

    images: Tensor
    labels: Tensor
    rows: list[str | None]

    @classmethod
    def of(cls, digits: Digits) -> MixedBatch:
        images = digits.test_images.clone()
        rows: list[str | None] = [None] * len(images)
        for start, (domain, shift) in enumerate(DOMAINS.items()):
            turns = slice(start, None, len(DOMAINS))
            images[turns] = shift(images[turns])
            if domain in SHIFTED:
                rows[turns] = [domain] * len(rows[turns])
        return cls(images, digits.test_labels, rows)

    def accuracies(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy of the base model, and of one call with a patch for each row."""
        with adapters.use(model):
            base = accuracy(model, self.images, self.labels)
        with adapters.use(model, rows=self.rows):
            return base, accuracy(model, self.images, self.labels)


@torch.no_grad()
def outputs(model: nn.Module, patch: adapters.Patch, digits: Digits) -> Tensor:
    """Logits (N, 10) of the test digits in a patch's own domain, with that patch alone."""
    with adapters.use(model, patch.name):
        return model(DOMAINS[patch.name](digits.test_images))


def load_again(source: str) -> tuple[nn.Module, adapters.Patch]:
    """Fresh model, and the published patch, loaded into it."""
    model = load_model()
    return model, adapters.load(model, source, name=SHIFTED[0])
