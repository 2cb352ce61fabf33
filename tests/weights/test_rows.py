"""Some rows of an adapted layer, as an adapter of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import adapters
import weights
from adapters import Copy, DoHa, DoRA, Full, HiRA, LoHa, LoKr, LoRA
from adapters.methods import METHODS
from adapters.methods.core.method import Method
from tests.adapters.models import perturb
from weights import LayerWeights
from weights.methods.core.rows import split_rows, take_rows

SIZES = (8, 4, 4)
METHODS_WITH_ROWS: dict[str, Callable[[], Method]] = {
    "LoRA": lambda: LoRA(rank=3, alpha=2),
    "LoRA with a bias": lambda: LoRA(rank=3, bias=True),
    "DoRA": lambda: DoRA(rank=3),
    "HiRA": lambda: HiRA(rank=3),
    "LoHa": lambda: LoHa(rank=3, alpha=2),
    "DoHa": lambda: DoHa(rank=3),
    "LoKr": lambda: LoKr(rank=1, factor=(4, 2)),
    "LoKr of whole factors": lambda: LoKr(rank=100, factor=(4, 2)),
    "LyCORIS' GLoRA": lambda: METHODS["lycoris-glora"](rank=3),
    "full": Full,
    "copy": Copy,
}


class Parts(nn.Module):
    """A layer, and its rows in three."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.whole = nn.ModuleList([layer])
        self.parts = nn.ModuleList(nn.Linear(6, size) for size in SIZES)
        with torch.no_grad():
            for name, value in layer.named_parameters():
                for part, rows in zip(self.parts, value.split(SIZES), strict=True):
                    part.get_parameter(name).copy_(rows)


@pytest.mark.parametrize("method", METHODS_WITH_ROWS)
def test_the_parts_do_together_what_the_whole_does(tmp_path: Path, method: str) -> None:
    model = Parts(nn.Linear(6, sum(SIZES)))
    x = torch.randn(5, 6)
    patch = adapters.inject(model.whole, METHODS_WITH_ROWS[method](), targets="0", name="whole")
    perturb(patch)
    expected = model.whole[0](x)
    patch.save_pretrained(tmp_path / "whole.safetensors", format="fluxion")
    file = weights.read_adapter(tmp_path / "whole.safetensors")
    parts = {
        path.replace("0", str(number), 1): part
        for path, layer in file.layers.items()
        for number, part in enumerate(split_rows(layer, SIZES))
    }
    weights.write_adapter(replace(file, layers=parts), tmp_path / "parts.safetensors", "fluxion")
    adapters.load(model.parts, tmp_path / "parts.safetensors")

    torch.testing.assert_close(torch.cat([part(x) for part in model.parts], -1), expected)


def lora(b: torch.Tensor, **hyperparameters: float) -> LayerWeights:
    numbers = {"rank": b.shape[1], "alpha": 3.0, **hyperparameters}
    return LayerWeights("lora", numbers, {"lora_A": torch.randn(b.shape[1], 6), "lora_B": b})


def test_rows_come_in_any_order_and_are_copies() -> None:
    layer = lora(torch.randn(6, 2))
    taken = take_rows(layer, [range(4, 6), range(4)], 6)
    assert torch.equal(taken.tensors["lora_B"], layer.tensors["lora_B"].roll(2, 0))
    assert torch.equal(taken.tensors["lora_A"], layer.tensors["lora_A"])
    assert taken.tensors["lora_A"].data_ptr() != layer.tensors["lora_A"].data_ptr()


@pytest.mark.parametrize("rslora", [False, True])
def test_parts_that_were_trained_apart_get_their_own_ranks_back(rslora: bool) -> None:
    ups = [torch.randn(size, 2) for size in SIZES]
    layer = lora(torch.block_diag(*ups), rslora=rslora)
    for number, part in enumerate(split_rows(layer, SIZES)):
        assert torch.equal(part.tensors["lora_B"], ups[number])
        assert torch.equal(part.tensors["lora_A"], layer.tensors["lora_A"][2 * number : 2 * number + 2])
        assert part.hyperparameters["rank"] == 2
        assert scale(part) == pytest.approx(scale(layer), rel=1e-15)


def scale(layer: LayerWeights) -> float:
    rank = layer.hyperparameters["rank"]
    return layer.hyperparameters["alpha"] / (rank**0.5 if layer.hyperparameters["rslora"] else rank)


def test_ranks_are_kept_unless_all_others_are_exactly_0() -> None:
    b = torch.block_diag(*(torch.randn(size, 2) for size in SIZES))
    b[0, 5] = 1e-45
    assert [part.hyperparameters["rank"] for part in split_rows(lora(b), SIZES)] == [6, 2, 2]
    assert [part.hyperparameters["rank"] for part in split_rows(lora(torch.zeros(16, 6)), SIZES)] == [6, 6, 6]
    assert [part.hyperparameters["rank"] for part in split_rows(lora(torch.zeros(16, 4)), SIZES)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lora(torch.randn(15, 2)), r"a lora_B \(15, 2\), not of 16 rows"),
        (lora(torch.tensor(1.0).view(1, 1)[0:0]), r"a lora_B \(0, 1\), not of 16 rows"),
        (LayerWeights("full", {}, {"diff": torch.tensor(1.0)}), r"a diff \(\), not of 16 rows"),
        (lora(torch.randn(16, 2), init="pissa"), "whose rows cannot be told apart"),  # type: ignore[arg-type]
        (LayerWeights("diag-oft", {}, {"oft_blocks": torch.randn(4, 4, 4)}), "whose rows cannot be told apart"),
        (LayerWeights("full", {}, {"diff": torch.ones(16), "more": torch.ones(16)}), "whose rows cannot be told apart"),
        (LayerWeights("lora", {}, {"lora_A": torch.ones(2, 6)}), "whose rows cannot be told apart"),
        (LayerWeights("lokr", {}, {"lokr_w1": torch.ones(16, 2)}), "factors that are no matrices"),
        (LayerWeights("lokr", {}, {"lokr_w1": torch.ones(16), "lokr_w2": torch.ones(1, 1)}), "are no matrices"),
        (LayerWeights("lokr", {}, {"lokr_w1": torch.ones(16, 2), "lokr_w2": torch.ones(0, 3)}), "are no matrices"),
        (LayerWeights("lokr", {}, {"lokr_w1": torch.ones(16, 2), "lokr_w2": torch.tensor(1.0)}), "are no matrices"),
        (
            LayerWeights("lokr", {"factor": (2, 2)}, {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 3)}),
            "lokr in blocks of 8 rows",
        ),
    ],
)
def test_what_has_no_rows_is_refused(layer: LayerWeights, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        split_rows(layer, SIZES)
