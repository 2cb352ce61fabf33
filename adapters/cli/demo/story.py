"""Sequence of the demo: `steps` calls the library, `show` prints."""

from __future__ import annotations

import time

import click
import torch
from rich.console import Console
from torch import Tensor, nn

from adapters import Patch
from adapters.cli.console import make_console
from adapters.cli.demo import show, steps
from adapters.cli.demo.data import DOMAINS, Digits, load_digits
from adapters.cli.demo.destination import Destination
from adapters.cli.demo.model import DigitClassifier, load_model
from adapters.cli.demo.proof import Snapshot

_A_SEVEN = 22  # Its number among the test digits; it looks different in each domain.
_LEAST_GAIN, _LARGEST_SHARE = 0.30, 0.10  # Promised: accuracy gained, and share of the base's parameters.


def tell(destination: Destination) -> None:
    """Run all steps and show them.

    Raises:
        click.ClickException: A promise of the demo does not hold.
    """
    started, console = time.monotonic(), make_console()
    with steps.one_thread():
        digits, model = load_digits(), load_model()
        before, size = Snapshot.of(model, digits.test_images), count(model)
        introduce(console, model, digits)
        patches = train(console, model, digits, size)
        table = toggle(console, model, digits)
        mix(console, model, digits)
        rotated = patches[0]
        answers = steps.outputs(model, rotated, digits)
        eject(console, patches, model, before, digits)
        publish(console, rotated, destination)
        load_back(console, destination, digits, answers)
    conclude(console, table, rotated.num_parameters() / size, time.monotonic() - started)


def introduce(console: Console, model: DigitClassifier, digits: Digits) -> None:
    """Show the model and the domains."""
    show.heading(console, f"A pretrained classifier of handwritten digits: a Chain of {count(model):,} parameters")
    show.tree(console, repr(model))
    show.heading(console, "It knows upright digits. Two domains are new to it")
    show.digits(console, {domain: shift(digits.test_images[_A_SEVEN, 0]) for domain, shift in DOMAINS.items()})


def train(console: Console, model: DigitClassifier, digits: Digits, size: int) -> list[Patch]:
    """Train a patch for each new domain, and show an adapted layer."""
    show.heading(console, "A LoRA patch for each, one trained after the other, while the base is frozen")
    show.code(
        console,
        "rotated = adapters.inject(model, adapters.LoRA(rank=4, alpha=8),",
        '                          targets=[nn.Conv2d, nn.Linear], name="rotated")',
    )
    patches = []
    with show.training(console) as progress:
        for name in steps.SHIFTED:
            patches.append(steps.inject(model, name))
            task = progress.add_task(name, total=steps.TRAINING_STEPS, loss=float("nan"))
            for loss in steps.train(model, patches[-1], digits):
                progress.update(task, advance=1, loss=loss)
    trained = patches[0].num_parameters()
    share = show.percent(trained / size, 2)
    show.lines(console, f"Each trains {trained:,} parameters, {share} of the base's. The last layer with both:")
    show.tree(console, repr(model.Head.Linear_2))
    return patches


def toggle(console: Console, model: DigitClassifier, digits: Digits) -> steps.Table:
    """Measure every set of active patches on every domain."""
    show.heading(console, f"Toggled at run time on this one model: accuracy on {len(digits.test_labels)} unseen digits")
    show.code(console, 'with adapters.use(model, "rotated"): ...')
    table = steps.accuracies(model, digits)
    show.accuracies(console, table)
    show.lines(console, "Both at once is the sum of two corrections, not a model with both skills.", style="dim")
    return table


def mix(console: Console, model: DigitClassifier, digits: Digits) -> None:
    """Run a mixed batch, with a patch for each row."""
    batch = steps.MixedBatch.of(digits)
    alone, mixed = map(show.percent, batch.accuracies(model))
    show.heading(console, f"One batch of {len(batch.rows)} digits, by turns upright, rotated and mirrored")
    show.code(console, 'with adapters.use(model, rows=[None, "rotated", "mirrored", ...]): ...')
    show.lines(console, f"One call, each row with its own patch: {mixed} right; without patches {alone}.")


def eject(console: Console, patches: list[Patch], model: DigitClassifier, before: Snapshot, digits: Digits) -> None:
    """Eject the patches, and prove that nothing is left of them."""
    show.heading(console, "Ejected without a trace: the model has what it had at the start")
    show.code(console, "rotated.eject()", "mirrored.eject()")
    for patch in patches:
        patch.eject()
    show.checks(console, before.compare(Snapshot.of(model, digits.test_images)))


def publish(console: Console, patch: Patch, destination: Destination) -> None:
    """Publish a patch."""
    with show.waiting(console, f"Publishing to {destination.title}"):
        published = destination.publish(patch)
    show.heading(console, f"Published: {destination.title}")
    show.code(console, f"{patch.name}.{destination.code}")
    show.lines(console, *published)


def load_back(console: Console, destination: Destination, digits: Digits, answers: Tensor) -> None:
    """Load the published adapter into a fresh model, and compare the outputs."""
    show.code(console, f'adapters.load(fresh_model, "{destination.source}")')
    model, patch = steps.load_again(destination.source)
    same = torch.equal(steps.outputs(model, patch, digits), answers)
    show.checks(console, {"a fresh model has the same outputs to the last bit": same})


def conclude(console: Console, table: steps.Table, share: float, seconds: float) -> None:
    """Print the results in one line, and check them against the promises."""
    results = {name: (table["base"][name], table[name][name]) for name in steps.SHIFTED}
    told = ", ".join(f"{name} {show.percent(base)} → {show.percent(own)}" for name, (base, own) in results.items())
    told += f"; {show.percent(share, 2)} trained"
    if share > _LARGEST_SHARE or any(own - base < _LEAST_GAIN for base, own in results.values()):
        raise click.ClickException(f"{told}: this is less than the demo promises.")
    show.summary(console, f"Done in {seconds:.0f} s: {told}.")


def count(model: nn.Module) -> int:
    """Number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
