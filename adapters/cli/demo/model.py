"""The small pretrained digit classifier, written as a Chain."""

from importlib.resources import as_file, files

import fluxion as fl
import weights

FILE_NAME = "digit_classifier.safetensors"


class ConvBlock(fl.Chain):
    """A 3x3 convolution and a ReLU: (N, in_channels, H, W) to (N, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(fl.Conv2d(in_channels, out_channels, kernel_size=3, padding=1), fl.ReLU())


class Head(fl.Chain):
    """Feature maps (N, 64, 8, 8) to one logit per digit (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            fl.MaxPool2d(2),
            fl.Flatten(start_dim=1),
            fl.Linear(64 * 4 * 4, 64),
            fl.ReLU(),
            fl.Linear(64, 10),
        )


class DigitClassifier(fl.Chain):
    """Grey images of digits (N, 1, 8, 8) in 0..1 to logits (N, 10); 85,066 parameters."""

    def __init__(self) -> None:
        super().__init__(ConvBlock(1, 32), ConvBlock(32, 64), Head())


def load_model() -> DigitClassifier:
    """New classifier with the packaged weights, in evaluation mode."""
    model = DigitClassifier()
    with as_file(files(__package__) / FILE_NAME) as path:
        model.load_state_dict(dict(weights.open(path)))
    return model.eval()
