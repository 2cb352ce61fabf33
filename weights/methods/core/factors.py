"""Checks of two low-rank factors: that both are there, and that their shapes fit each other."""

from __future__ import annotations

import re
from collections.abc import Container

from torch import Tensor

_FACTOR = re.compile(
    r"(.*(?:lora_|lora_embedding_|_linear_layer\.|lora[12]?\.|:))(A|B|a|b|down|up)((?:\.default)?(?:\.weight)?)",
    re.DOTALL,
)
_OTHER = {"A": "B", "B": "A", "a": "b", "b": "a", "down": "up", "up": "down"}


def partner(key: str) -> str | None:
    """The key of the other factor, in the same spelling; None where a key names no factor of a LoRA.

    Example:
        >>> partner("fc.lora_A.weight")
        'fc.lora_B.weight'
    """
    match = _FACTOR.fullmatch(key)
    return f"{match[1]}{_OTHER[match[2]]}{match[3]}" if match else None


def lone_factor(key: str, keys: Container[str]) -> str | None:
    """The problem of a factor without the other one, None if a file with these keys has both."""
    other = partner(key)
    return None if other is None or other in keys else missing(key, other)


def missing(key: str, *others: str) -> str:
    """The problem of a tensor without others that belong to it."""
    return f"`{key}` has no {' and no '.join(f'`{other}`' for other in others)}"


def shape_mismatch(
    a: Tensor,
    b: Tensor,
    rank: object = None,
    *,
    names: tuple[str, str] = ("lora_A", "lora_B"),
    axes: tuple[int, int] = (0, 1),
    flat: bool = False,
    least: int = 1,
) -> str | None:
    """The problem of two factors whose shapes do not fit each other, None if they do.

    Args:
        a: `(rank, in, *kernel)`.
        b: `(out, rank, 1, ...)`, with as many dimensions.
        rank: Their rank; by default any that both have.
        names: How to name them.
        axes: Which dimension of each has the rank, where a file has them transposed.
        flat: Whether both have to be 2-D.
        least: The smallest rank that is sound.
    """
    fit = a.ndim == b.ndim and (a.ndim == 2 if flat else a.ndim >= 2) and set(b.shape[2:]) <= {1}
    if fit and least <= a.shape[axes[0]] == b.shape[axes[1]] and rank in (None, a.shape[axes[0]]):
        return None
    expected = "" if rank is None else f" of rank {rank}"
    return f"{names[0]} {tuple(a.shape)} and {names[1]} {tuple(b.shape)}{expected}, a shape mismatch"
