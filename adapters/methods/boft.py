"""BOFT: rotations in blocks, one after the other in the pattern of a butterfly, that mix features across blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapters.errors import TargetError
from adapters.layers.dtypes import widened
from adapters.methods.core.checks import is_integer, need
from adapters.methods.core.method import Method, Tensors
from adapters.methods.core.rotations import OutputRotation, butterfly, cayley, cut, need_blocks
from adapters.methods.core.spec import WeightSpec


@dataclass(frozen=True)
class BOFT(Method):
    """Butterfly orthogonal fine-tuning of the inputs, and a factor for each output.

    Args:
        block_size: The size of the blocks, which has to divide the number of inputs; 4 if `blocks` is not given.
        blocks: The number of blocks instead.
        factors: How many rotations: 1 is OFT, and each further one doubles how far a feature reaches. More than 1 need
            an even block size, and blocks in a multiple of `2 ** (factors - 1)`.

    Raises:
        AdapterError: A number is out of its range, or both `block_size` and `blocks` are given.
    """

    key = "boft"
    paper = "arXiv:2311.06243"
    formula = "diag(s) W R₁ᵀ ... Rₘᵀ, with R = (I - Q)(I + Q)⁻¹ in permuted blocks, Q = (A - Aᵀ) / 2"

    block_size: int = 0
    blocks: int = 0
    factors: int = 1

    def __post_init__(self) -> None:
        need_blocks(self, usual=4)
        need_factors(self)

    def check_site(self, site: WeightSpec) -> None:
        check_butterfly(self, site, *cut(self, site, site.shape[-1]))

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        blocks, size = cut(self, site, site.shape[-1])
        outputs = site.shape[-2]
        return {
            "boft_R": site.zeros(self.factors, blocks, size, size),
            "boft_s": site.ones(1, outputs) if site.matrix.kind == "convolution" else site.ones(outputs, 1),
        }

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        rotations = cayley(widened(t.boft_R - t.boft_R.mT) / 2)
        return butterfly(weight, rotations.mT) * t.boft_s.view(-1, 1)


@dataclass(frozen=True)
class OutputBOFT(OutputRotation):
    """BOFT of the outputs, as LyCORIS has it. For the other arguments see `OutputRotation`.

    Args:
        factors: How many rotations; 0 for as many as the number of blocks allows, so that each output comes to act on
            each if that is a power of 2. More than 1 need an even block size, and blocks in a multiple of
            `2 ** (factors - 1)`.

    Raises:
        AdapterError: A number is out of its range, or both `block_size` and `blocks` are given.
    """

    key = "output-boft"
    paper = "arXiv:2311.06243"
    formula = "diag(s) Rₘ ... R₁ W, with R = (I + Q)(I - Q)⁻¹ in permuted blocks, Q = B - Bᵀ"

    factors: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        need_factors(self, least=0)

    def block_shape(self, site: WeightSpec) -> tuple[int, ...]:
        blocks, size = cut(self, site, site.shape[-2])
        check_butterfly(self, site, blocks, size)
        return self.factors or most_factors(blocks, size), blocks, size, size

    def turn(self, y: Tensor, rotations: Tensor) -> Tensor:
        # LyCORIS counts the features of a block through its two halves in turn. The transpose makes up for the other
        # sign in its R, and for R standing before W.
        size = rotations.shape[-1]
        halves = [*range(0, size, 2), *range(1, size, 2)]
        return butterfly(y, rotations[..., halves, :][..., halves])


def need_factors(method: BOFT | OutputBOFT, least: int = 1) -> None:
    """Check `factors`."""
    factors = method.factors
    need(is_integer(factors, least), method, f"a number of factors that is an integer of {least} or more", factors)


def check_butterfly(method: BOFT | OutputBOFT, site: WeightSpec, blocks: int, size: int) -> None:
    """Raise a TargetError unless blocks of that size and number allow as many factors as there are to be."""
    if method.factors > most_factors(blocks, size):
        raise TargetError(
            f"{site.path} has {blocks} blocks of {size}, too few or of an odd size for {method.factors} factors: choose"
            " fewer factors or an even block_size, or exclude it."
        )


def most_factors(blocks: int, size: int) -> int:
    """One, and for an even size one more for each time that the number of blocks can be halved."""
    return (blocks & -blocks).bit_length() if size % 2 == 0 else 1
