"""FourierFT: a few coefficients of the Fourier transform of the update are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.methods.core.checks import need_count, need_number, need_seed
from adapters.methods.core.formulas import Additive
from adapters.methods.core.method import Branch
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class FourierFT(Additive):
    """Fine-tuning of Fourier coefficients.

    The trained coefficients of an `(outputs, inputs)` update are drawn with the seed, so layers of one shape train the
    same ones. The spectrum is zero at first, which changes nothing; in the paper it is normally distributed.

    Args:
        n_frequency: The number of coefficients that each layer trains.
        scaling: The strength.
        seed: The random seed of the positions of the coefficients.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.FourierFT(n_frequency=100))
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("fourierft")
    """

    key = "fourierft"
    paper = "arXiv:2405.03003"
    formula = "W + s Re(ifft2(F)), with F zero but for some trained values"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})

    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777

    def __post_init__(self) -> None:
        need_count(self, "n_frequency")
        need_number(self, "scaling")
        need_seed(self)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape[-2:]
        if self.n_frequency > outputs * inputs:
            raise TargetError(
                f"{spec.path} has {outputs * inputs} Fourier coefficients, {outputs} × {inputs}, fewer than"
                f" n_frequency={self.n_frequency}: give it a smaller one."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"fourierft_spectrum": spec.zeros(*spec.shape[:-2], self.n_frequency)}

    def constants(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"positions": spec.shuffled(self.seed)[: self.n_frequency].to(spec.device, copy=True)}

    def delta(self, t: Tensors) -> Tensor:
        spectrum = t.fourierft_spectrum
        flat = spectrum.new_zeros(*t.shape[:-2], t.shape[-2] * t.shape[-1])
        return torch.fft.ifft2(flat.index_copy(-1, t.positions, spectrum).view(t.shape)).real * self.scaling

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        return {"fourierft_spectrum": branch.fourierft_spectrum}
