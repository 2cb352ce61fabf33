"""FourierFT's tensors in foreign files."""

import re

from weights.methods.core.peft import PeftLayout


def _after_dot(path: str) -> str:
    """A pattern for a layer, in settings of which PEFT matches patterns only after a dot and whole paths as they are.

    So where there is a dot, the part before it is looked back at.
    """
    head, dot, name = path.rpartition(".")
    return rf"(?<=^{re.escape(head)}\.){re.escape(name)}" if dot else path


PEFT = PeftLayout(
    "fourierft",
    "FOURIERFT",
    settings={
        "n_frequency": ("n_frequency", 1000),
        "scaling": ("scaling", 150.0),
        "seed": ("random_loc_seed", 777),
    },
    patterns={"n_frequency": "n_frequency_pattern"},
    pattern=_after_dot,
    tensors={"fourierft_spectrum": "fourierft_spectrum"},
    biases=True,
    # PEFT sorts the patterns when it saves them, which can make another one the first that matches.
    of_layer=lambda config, path, tensors: {"n_frequency": tensors["fourierft_spectrum"].shape[-1]},
)
