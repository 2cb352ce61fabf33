"""VB-LoRA: the factors are composed of vectors from one trained bank that all layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.methods.core.checks import need, need_count, need_rank
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class VBLoRA(LowRank):
    """Low-rank adaptation with a vector bank.

    Rows of A and columns of B are cut into pieces. Each piece is a mixture of the `topk` vectors of the bank that have
    the largest logits, weighted by their softmax. The bank has small random values at first, as a bank of zeros could
    not learn, so the initial update is small, at most `rank · 0.02²` in each entry, and not zero.

    Args:
        rank: Rows of A and columns of B.
        num_vectors: The number of vectors in the bank.
        vector_length: Their length, which has to divide the inputs and the outputs of every layer.
        topk: The number of vectors that are mixed for each piece.
        only_topk: There are no logits, only the indices of the vectors and their weights, as in files that were saved
            for inference. Such an adapter cannot be trained.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.VBLoRA(num_vectors=16, vector_length=8))
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("vblora")
    """

    key = "vblora"
    paper = "arXiv:2405.15179"
    formula = "W + B A, with pieces Σ softmax(top-k logits) · vectors of the bank"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})

    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    only_topk: bool = False

    def __post_init__(self) -> None:
        need_rank(self)
        for name in ("num_vectors", "vector_length", "topk"):
            need_count(self, name)
        need(self.topk <= self.num_vectors, self, f"a topk of at most num_vectors={self.num_vectors}", self.topk)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape[-2:]
        if outputs % self.vector_length or inputs % self.vector_length:
            raise TargetError(
                f"{spec.path} is {outputs} × {inputs}, not multiples of vector_length={self.vector_length}: choose a"
                " length that divides both, or exclude the layer."
            )

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        if self.only_topk:
            raise TargetError(
                f"{type(self).__name__} without logits cannot be trained: it was saved for inference, with"
                " save_only_topk_weights. Save it with all logits to train on."
            )

    def check_tensors(self, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("_topk_indices") and tensor.numel():
                least, most = (int(number) for number in tensor.long().aminmax())
                if least < 0 or most >= self.num_vectors:
                    raise TargetError(f"{name} has indices from {least} to {most}, for {self.num_vectors} vectors")

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        shapes = {} if self.only_topk else self._pieces(spec)
        return {name: spec.normal(*shape, self.num_vectors, std=0.1) for name, shape in shapes.items()}

    def constants(self, spec: WeightSpec) -> dict[str, Tensor]:
        tensors = {}
        for name, shape in (self._pieces(spec) if self.only_topk else {}).items():
            tensors[f"{name}_topk_indices"] = spec.zeros(*shape, self.topk).to(_integers(self.num_vectors))
            tensors[f"{name}_topk_weights"] = spec.zeros(*shape, self.topk - 1)
        return tensors

    def shared_shapes(self, specs: Sequence[WeightSpec]) -> dict[str, tuple[int, ...]]:
        return {"vblora_vector_bank": (self.num_vectors, self.vector_length)}

    def shared(self, specs: Sequence[WeightSpec]) -> dict[str, Tensor]:
        shapes = self.shared_shapes(specs)
        return {name: nn.Parameter(specs[0].uniform(*shape, bound=0.02)) for name, shape in shapes.items()}

    def _pieces(self, spec: WeightSpec) -> dict[str, tuple[int, ...]]:
        """The names of the logits, and the shape of the pieces of each."""
        *stack, outputs, inputs = spec.shape
        return {
            "vblora_logits_A": (*stack, self.rank, inputs // self.vector_length),
            "vblora_logits_B": (*stack, outputs // self.vector_length, self.rank),
        }

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        up, down = self._mixed("vblora_logits_B", t), self._mixed("vblora_logits_A", t)
        return up.mT.flatten(-3, -2), down.flatten(-2)

    def _mixed(self, logits: str, t: Tensors) -> Tensor:
        """The pieces, each a mixture of vectors of the bank."""
        if self.only_topk:  # All but the last weight, as they add up to 1.
            weights, indices = t[f"{logits}_topk_weights"], t[f"{logits}_topk_indices"].long()
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        else:
            weights, indices = t[logits].topk(self.topk, dim=-1)
            weights = weights.softmax(-1)
        return (weights.unsqueeze(-1) * t.vblora_vector_bank[indices]).sum(-2)


def _integers(count: int) -> torch.dtype:
    """The smallest integer dtype for indices below a count."""
    sizes = {2**8: torch.uint8, 2**15: torch.int16, 2**31: torch.int32}
    return next((dtype for size, dtype in sizes.items() if count < size), torch.int64)
