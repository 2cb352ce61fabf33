"""BOFT: successive rotations in blocks, in the pattern of a butterfly, which mix features across blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapters.errors import TargetError
from adapters.layers.dtypes import widened
from adapters.methods.core.checks import is_integer, need
from adapters.methods.core.method import Method
from adapters.methods.core.rotations import OutputRotation, butterfly, cayley, cut, need_blocks
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class BOFT(Method):
    """Butterfly orthogonal fine-tuning of the inputs, and a factor for each output.

    Args:
        block_size: The size of the blocks, which has to divide the number of inputs; 4 if `blocks` is not given.
        blocks: The number of blocks instead.
        factors: The number of rotations: 1 is OFT, and each further one doubles the reach of a feature. More than 1
            need an even block size, and blocks in a multiple of `2 ** (factors - 1)`.

    Raises:
        AdapterError: A number is out of its range, or both `block_size` and `blocks` are given.

    Example:
        >>> patch = adapters.inject(model, adapters.BOFT(block_size=4, factors=2))
        >>> patch.merge()
        >>> patch.save_pretrained("boft")
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

    def check_spec(self, spec: WeightSpec) -> None:
        check_butterfly(self, spec, *cut(self, spec, spec.shape[-1]))

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        blocks, size = cut(self, spec, spec.shape[-1])
        outputs = spec.shape[-2]
        return {
            "boft_R": spec.zeros(self.factors, blocks, size, size),
            "boft_s": spec.ones(1, outputs) if spec.matrix.kind == "convolution" else spec.ones(outputs, 1),
        }

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        rotations = cayley(widened(t.boft_R - t.boft_R.mT) / 2)
        return butterfly(weight, rotations.mT) * t.boft_s.view(-1, 1)


@dataclass(frozen=True)
class OutputBOFT(OutputRotation):
    """BOFT of the outputs, as LyCORIS has it. For the other arguments see `OutputRotation`.

    Args:
        factors: The number of rotations; 0 for as many as the number of blocks allows, so that each output acts on each
            if that is a power of 2. More than 1 need an even block size, and blocks in a multiple of
            `2 ** (factors - 1)`.

    Raises:
        AdapterError: A number is out of its range, or both `block_size` and `blocks` are given.

    Example:
        >>> patch = adapters.inject(model, adapters.OutputBOFT(block_size=4))
        >>> patch.merge()
        >>> patch.save_pretrained("boft.safetensors", format="lycoris")
    """

    key = "output-boft"
    paper = "arXiv:2311.06243"
    formula = "diag(s) Rₘ ... R₁ W, with R = (I + Q)(I - Q)⁻¹ in permuted blocks, Q = B - Bᵀ"

    factors: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        need_factors(self, least=0)

    def block_shape(self, spec: WeightSpec) -> tuple[int, ...]:
        blocks, size = cut(self, spec, spec.shape[-2])
        check_butterfly(self, spec, blocks, size)
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


def check_butterfly(method: BOFT | OutputBOFT, spec: WeightSpec, blocks: int, size: int) -> None:
    """Raise a TargetError unless blocks of that size and number allow the number of factors."""
    if method.factors > most_factors(blocks, size):
        raise TargetError(
            f"{spec.path} has {blocks} blocks of {size}, too few or of an odd size for {method.factors} factors: choose"
            " fewer factors or an even block_size, or exclude it."
        )


def most_factors(blocks: int, size: int) -> int:
    """One, and for an even size one more for each time that the number of blocks can be halved."""
    return (blocks & -blocks).bit_length() if size % 2 == 0 else 1
