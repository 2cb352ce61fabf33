"""Time and error of extracting a LoRA from the difference of two weights, and of resizing a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adapters.lowrank.low_rank import LowRank
from adapters.lowrank.svd import nearest
from benchmarks.harness import Ratio, Row, Timed, median, ratio, report, rounds

RANK = 32
ENERGY = 0.9
SMALLER = 8
SHAPES = [(320, 320), (1024, 1024), (2048, 768), (4096, 1024)]
QUANTILE = 0.99
TRAINED, NOISY = 2e-4, 1e-3

Ways = Mapping[str, Callable[[], LowRank]]


def tuned(outputs: int, inputs: int, noise: float) -> Tensor:
    """Difference like that of training: decaying singular values, and noise below them."""
    size = min(outputs, inputs)
    scales = 1 / torch.arange(1, size + 1)
    falling = (torch.randn(outputs, size) * scales) @ torch.randn(size, inputs) / size
    return falling + noise * torch.randn(outputs, inputs)


def whole(matrix: Tensor, rank: int | None = None) -> LowRank:
    """Full SVD, truncated at a rank, or where the energy is kept."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        shares = s.square().cumsum(0) / s.square().sum()
        rank = int((shares < ENERGY).sum()) + 1
    return LowRank(u[:, :rank] * s[:rank], vt[:rank])


def kohya_extracts(matrix: Tensor) -> LowRank:
    """Extraction as in kohya's extract_lora_from_models.py: entries are clamped to the quantile of all."""
    resized = kohya_resizes(matrix, RANK)
    up, down = resized.up, resized.down
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), QUANTILE)
    return LowRank(up.clamp(-most, most), down.clamp(-most, most))


def kohya_resizes(matrix: Tensor, rank: int) -> LowRank:
    """Resizing as in kohya's resize_lora.py, where not both sides are above 2048."""
    u, s, vt = torch.linalg.svd(matrix)
    return LowRank(u[:, :rank] @ torch.diag(s[:rank]), vt[:rank])


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def compare(what: str, matrix: Tensor, ways: Ways) -> Row:
    """Time and error of several ways, the first of which is this library's."""
    made: dict[str, LowRank] = {}

    def one_round(timed: Timed) -> None:
        for name, way in ways.items():
            made[name] = timed(name, way)

    times = rounds(one_round, seconds=2.0, least=3)
    row: Row = {"task": what, "layer": "{} × {}".format(*matrix.shape), "ms": 1e3 * median(times, "here")}
    row |= {f"/ {name}": ratio(times, "here", name) for name in ways if name != "here"}
    size = torch.linalg.vector_norm(matrix)
    for name, update in made.items():
        row[f"error, {name}"] = Ratio.exact(float(torch.linalg.vector_norm(update.matrix() - matrix) / size))
    return row


def compare_all() -> list[Row]:
    rows: list[Row] = []
    for shape in SHAPES:
        matrix = tuned(*shape, TRAINED)
        extracting: Ways = {
            "here": lambda matrix=matrix: nearest(matrix, RANK, generator=chance()),  # type: ignore[misc]
            "torch.linalg.svd": lambda matrix=matrix: whole(matrix, RANK),  # type: ignore[misc]
            "kohya's": lambda matrix=matrix: kohya_extracts(matrix),  # type: ignore[misc]
        }
        rows.append(compare(f"extract, rank {RANK}", matrix, extracting))
    for name, noise in (("few", TRAINED), ("many", NOISY)):
        matrix = tuned(1024, 1024, noise)
        keeping: Ways = {
            "here": lambda matrix=matrix: nearest(matrix, energy=ENERGY, generator=chance()),  # type: ignore[misc]
            "torch.linalg.svd": lambda matrix=matrix: whole(matrix),  # type: ignore[misc]
        }
        rank = whole(matrix).rank
        rows.append(compare(f"extract, energy {ENERGY}, which {name} columns keep: {rank}", matrix, keeping))
    for shape in SHAPES[1:3]:
        up, down, _ = torch.svd_lowrank(tuned(*shape, TRAINED), RANK)
        update = LowRank(up * down, torch.randn(RANK, shape[1]))
        resizing: Ways = {
            "here": lambda update=update: update.truncated(SMALLER),  # type: ignore[misc]
            "torch.linalg.svd": lambda update=update: whole(update.matrix(), SMALLER),  # type: ignore[misc]
            "kohya's": lambda update=update: kohya_resizes(update.matrix(), SMALLER),  # type: ignore[misc]
        }
        rows.append(compare(f"resize, rank {RANK} to {SMALLER}", update.matrix(), resizing))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report(
        "extract",
        "A LoRA of the difference of two weights, and one of lower rank of a LoRA, in float32: time as a ratio to the"
        " decomposition of the whole matrix, and to the methods of kohya's scripts, which decompose all of it too"
        f" and, to extract, cut entries to their quantile of {QUANTILE}; and the error, the norm of what is missing by"
        " that of the matrix.",
        compare_all(),
    )


if __name__ == "__main__":
    main()
