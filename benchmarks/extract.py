"""What it takes to extract a LoRA from the difference of two weights, and how near it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adapters.factored import Factors, nearest
from benchmarks.harness import Ratio, Row, Timed, median, ratio, report, rounds

RANK = 32
SHAPES = [(320, 320), (1280, 1280), (2048, 768), (4096, 1024)]
QUANTILE = 0.99


def tuned(outputs: int, inputs: int) -> Tensor:
    """A difference such as training leaves: singular values that fall off, and noise below them."""
    size = min(outputs, inputs)
    scales = 1 / torch.arange(1, size + 1)
    return (torch.randn(outputs, size) * scales) @ torch.randn(size, inputs) / size + torch.randn(
        outputs, inputs
    ) * 2e-4


def whole(difference: Tensor) -> Factors:
    """The decomposition of the whole matrix, cut off."""
    u, s, vt = torch.linalg.svd(difference, full_matrices=False)
    return u[:, :RANK] * s[:RANK], vt[:RANK]


def as_kohya(difference: Tensor) -> Factors:
    """As kohya's script does: the same, with the largest entries cut to the quantile of all."""
    u, s, vt = torch.linalg.svd(difference)
    up, down = u[:, :RANK] @ torch.diag(s[:RANK]), vt[:RANK]
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()])[: 1 << 24], QUANTILE)
    return up.clamp(-most, most), down.clamp(-most, most)


def here(difference: Tensor) -> Factors:
    return nearest(difference, RANK, generator=torch.Generator().manual_seed(0))


WAYS: dict[str, Callable[[Tensor], Factors]] = {"here": here, "torch.linalg.svd": whole, "kohya's": as_kohya}


def compare(outputs: int, inputs: int) -> Row:
    difference = tuned(outputs, inputs)
    made: dict[str, Factors] = {}

    def one_round(timed: Timed) -> None:
        for name, way in WAYS.items():
            made[name] = timed(name, lambda way=way: way(difference))  # type: ignore[misc]

    times = rounds(one_round, seconds=4.0, least=3)
    row: Row = {"layer": f"{outputs} × {inputs}", "ms": 1e3 * median(times, "here")}
    row |= {f"/ {name}": ratio(times, "here", name) for name in WAYS if name != "here"}
    size = torch.linalg.vector_norm(difference)
    for name, (up, down) in made.items():
        row[f"error, {name}"] = Ratio.exact(float(torch.linalg.vector_norm(up @ down - difference) / size))
    return row


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report(
        "extract",
        f"A LoRA of rank {RANK} extracted from the difference of two weights, in float32: time as a ratio to the"
        " decomposition of the whole matrix, and to the method of kohya's script, which decomposes the whole matrix too"
        f" and cuts entries to their quantile of {QUANTILE}; and the error, the norm of what is missing by that of the"
        " difference.",
        [compare(*shape) for shape in SHAPES],
    )


if __name__ == "__main__":
    main()
