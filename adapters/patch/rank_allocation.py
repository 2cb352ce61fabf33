"""`RankAllocator`: pruning of AdaLoRA to a budget of ranks during training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adapters.errors import AdapterError
from adapters.layers.sharded import gather, shard_like
from adapters.methods.adalora import AdaLoRA
from adapters.methods.core.checks import is_integer
from adapters.methods.core.tensors import Tensors
from adapters.patch.patch import Patch


class RankAllocator:
    """Rank allocation of AdaLoRA over the layers of a patch (arXiv:2303.10512, 3.2 and 3.3).

    Every rank of every layer has an importance: the sensitivity of the loss to its entries, smoothed over the steps,
    times the uncertainty of that. The least important ones of the whole patch are pruned, by zeros in E, until
    `target_rank` per layer is left; the budget falls with the cube of the steps. A pruned rank may come back until the
    last `final` steps.

    Example:
        >>> patch = adapters.inject(model, adapters.AdaLoRA(rank=4))
        >>> optimizer = torch.optim.AdamW(patch.parameters())
        >>> allocator = adapters.RankAllocator(patch, total_steps=10, target_rank=2)
        >>> for step in range(10):
        ...     loss = model(x).square().mean() + 0.5 * allocator.orthogonality()
        ...     loss.backward()
        ...     optimizer.step()
        ...     allocator.step(step)
        ...     optimizer.zero_grad()

    Args:
        patch: A patch with branches of `AdaLoRA`.
        total_steps: Number of training steps.
        target_rank: Final rank of a layer, on average.
        warmup: Steps at the start without pruning.
        final: Steps at the end with the ranks that are left then.
        interval: Steps from one pruning to the next.
        beta1: Smoothing of the sensitivity, between 0 and 1.
        beta2: Smoothing of the uncertainty, between 0 and 1.

    Raises:
        AdapterError: The patch has no AdaLoRA, or a number is out of its range.
    """

    def __init__(
        self,
        patch: Patch,
        total_steps: int,
        target_rank: int = 8,
        warmup: int = 0,
        final: int = 0,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        patch.reshard()
        branches = [attachment.branch for attachment in patch.attachments if not attachment.branch.tied]
        self._triplets = [Tensors(b.tensors(), b.matrix) for b in branches if isinstance(b.method, AdaLoRA)]
        if not self._triplets:
            raise AdapterError(f"The patch {patch.name!r} has no AdaLoRA, which is what RankAllocator prunes.")
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise AdapterError(f"beta1 and beta2 have to be between 0 and 1, not {beta1} and {beta2}.")
        if not all(is_integer(number) for number in (total_steps, target_rank, warmup, final, interval)):
            raise AdapterError("total_steps, target_rank, warmup, final and interval have to be integers.")
        if min(warmup, final, target_rank) < 0 or interval < 1 or warmup >= total_steps - final:
            raise AdapterError(
                f"Of {total_steps} steps, {warmup} of warmup and {final} final ones leave none to prune in: none of"
                " these, nor target_rank, may be negative, and the interval is 1 or more."
            )
        self.total_steps, self.warmup, self.final, self.interval = total_steps, warmup, final, interval
        self.betas = beta1, beta2
        self.initial_budget = sum(t.lora_E.numel() for t in self._triplets)
        self.target_budget = min(target_rank * len(self._triplets), self.initial_budget)
        entries = [tensor for t in self._triplets for tensor in t.values()]
        # Gathered, where the patch is sharded: so all processes find the same importance.
        self._sensitivity = {id(tensor): torch.zeros_like(gather(tensor)) for tensor in entries}
        self._uncertainty = {id(tensor): torch.zeros_like(gather(tensor)) for tensor in entries}
        self._pruned: list[Tensor] = []

    def budget(self, number: int) -> int:
        """The number of ranks left after a step, in the whole patch."""
        if number <= self.warmup:
            return self.initial_budget
        last = self.total_steps - self.final
        left = max(1 - (number - self.warmup) / (last - self.warmup), 0.0)
        return int((self.initial_budget - self.target_budget) * left**3 + self.target_budget)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Prune, if it is time: to be called in every step, from 0 on, while there are gradients.

        Args:
            number: The number of the step.

        Raises:
            AdapterError: There are no gradients: it was called before `backward`, or after they were cleared.
        """
        last = self.total_steps - self.final
        if number < last:
            self._observe()
        if number == last or (self.warmup < number < last and number % self.interval == 0):
            self._pruned = self._least_important(self.initial_budget - self.budget(number))
        elif number < last:
            return
        for t, pruned in zip(self._triplets, self._pruned, strict=False):
            t.lora_E.masked_fill_(shard_like(pruned, t.lora_E), 0.0)

    def orthogonality(self) -> Tensor:
        """Mean distance of A from orthogonal rows and of B from orthogonal columns, to be added to the loss."""
        return torch.stack(
            [_gram_error(rows) for t in self._triplets for rows in (gather(t.lora_A), gather(t.lora_B).mT)]
        ).mean()

    def _observe(self) -> None:
        """Update sensitivity and uncertainty by the gradients of a step."""
        beta1, beta2 = self.betas
        entries = [tensor for t in self._triplets for tensor in t.values()]
        if all(tensor.grad is None for tensor in entries):
            raise AdapterError("There are no gradients: call step() after backward(), and before they are cleared.")
        for tensor in entries:
            grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            seen = (gather(tensor) * gather(grad)).abs()
            smooth = self._sensitivity[id(tensor)].lerp_(seen, 1 - beta1)
            self._uncertainty[id(tensor)].lerp_((seen - smooth).abs(), 1 - beta2)

    def _least_important(self, count: int) -> list[Tensor]:
        """For each E, a mask of its entries that are among the `count` least important ones of the patch."""
        scores = list(self._importance())
        order = torch.cat([score.flatten().cpu() for score in scores]).argsort()
        pruned = torch.zeros(len(order), dtype=torch.bool)
        pruned[order[:count]] = True
        parts = pruned.split([score.numel() for score in scores])
        return [part.view_as(score).to(score.device) for part, score in zip(parts, scores, strict=True)]

    def _importance(self) -> Iterator[Tensor]:
        """Importance of each rank: of its entry of E, plus the means over its row of A and its column of B."""
        for t in self._triplets:
            a, b, e = (
                self._sensitivity[id(tensor)] * self._uncertainty[id(tensor)]
                for tensor in (t.lora_A, t.lora_B, t.lora_E)
            )
            yield e + a.mean(-1, keepdim=True) + b.mean(-2).unsqueeze(-1)


def _gram_error(rows: Tensor) -> Tensor:
    gram = rows @ rows.mT
    return torch.linalg.vector_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
