"""Make the two files that `fluxion demo` carries: the digits, and the classifier pretrained on them.

    pip install scikit-learn
    python examples/pretrain_digits.py

Takes about twenty seconds. The same machine gives the same bytes every time.
"""

from pathlib import Path

import torch
from sklearn import datasets
from torch import nn

import adapters.cli.demo
import weights
from adapters.cli.demo import data, model

FOLDER = Path(adapters.cli.demo.__file__).parent
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 1500, 64, 3e-3, 1e-2
ATTRIBUTION = {
    "title": "Optical Recognition of Handwritten Digits (test set)",
    "authors": "E. Alpaydin, C. Kaynak",
    "source": "https://doi.org/10.24432/C50P49",
    "license": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
}


def write_digits(path: Path) -> None:
    """Store scikit-learn's digits: images uint8 (1797, 8, 8) in 0..16, labels uint8 (1797,)."""
    digits = datasets.load_digits()
    tensors = {
        "images": torch.tensor(digits.images, dtype=torch.uint8),
        "labels": torch.tensor(digits.target, dtype=torch.uint8),
    }
    weights.save(tensors, path, metadata=ATTRIBUTION)


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Move the whole batch (N, 1, 8, 8) by at most one pixel along each axis."""
    top, left = torch.randint(3, (2,)).tolist()
    return nn.functional.pad(images, (1, 1, 1, 1))[..., top : top + 8, left : left + 8]


def pretrain(digits: data.Digits) -> model.DigitClassifier:
    """Train a classifier on the upright training digits."""
    classifier = model.DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(digits.train_labels), (BATCH_SIZE,))
        loss = nn.functional.cross_entropy(classifier(jitter(digits.train_images[rows])), digits.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier


def main() -> None:
    """Write both files next to the demo's code, then print the accuracy on the test digits of each domain."""
    torch.set_num_threads(1)  # so that sums are taken in one order, however many cores there are
    torch.manual_seed(0)

    write_digits(FOLDER / data.FILE_NAME)
    digits = data.load_digits()
    weights.save(
        pretrain(digits).state_dict(),
        FOLDER / model.FILE_NAME,
        metadata={"trained_on": ATTRIBUTION["source"]},
    )

    classifier = model.load_model()
    for name, domain in data.DOMAINS.items():
        with torch.no_grad():
            guesses = classifier(domain(digits.test_images)).argmax(dim=1)
        print(f"{name}: {(guesses == digits.test_labels).float().mean():.1%}")


if __name__ == "__main__":
    main()
