"""From every format that is written into every other: a model computes the same with what comes back."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters
import weights
from adapters import DoRA, LoRA, Method
from tests.adapters.models import perturb
from tests.thinned import one_in

# What the layers of a model are, by the formats that can hold adapters of them.
HELD = {
    "fluxion": {"fc", "out", "conv", "embed_tokens"},
    "peft": {"fc", "out", "conv", "embed_tokens"},
    "diffusers": {"fc", "out", "conv", "embed_tokens"},
    "lycoris": {"fc", "out", "conv"},
    "mlx": {"fc", "out", "embed_tokens"},
}
RULES: dict[str, dict[str | None, Method]] = {
    "lora": {None: LoRA(rank=2, alpha=4)},
    "an alpha of 3": {None: LoRA(rank=2, alpha=3)},
    "no alpha": {None: LoRA(rank=2)},
    "an alpha of 0": {None: LoRA(rank=2, alpha=0)},
    "rslora": {None: LoRA(rank=2, alpha=3, rslora=True)},
    "dora": {None: DoRA(rank=2, alpha=4)},
    "ranks": {"fc": LoRA(rank=1, alpha=2), None: LoRA(rank=3, alpha=6)},
    "alphas": {"fc": LoRA(rank=2, alpha=1), "out": LoRA(rank=2, alpha=0), None: LoRA(rank=2, alpha=7)},
    "ranks and alphas": {"fc": LoRA(rank=1, alpha=5), None: LoRA(rank=4, alpha=3)},
    "doras": {"fc": DoRA(rank=1, alpha=5), None: DoRA(rank=3, alpha=2)},
}
# Where a format has no place for a number, it goes into a factor, or another number stands for it.
FOLDED = {
    "lycoris": {"an alpha of 0", "rslora", "alphas"},
    "mlx": {"an alpha of 3", "an alpha of 0", "rslora", "ranks", "alphas", "ranks and alphas", "doras"},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        return self.out(torch.tanh(self.fc(x + self.conv(x.mT).mT)))


def net(dtype: torch.dtype) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return Net().to(dtype).eval()


PAIRS = list(product(HELD, repeat=2))
HALVES = product(["rslora", "ranks and alphas", "doras"], [torch.bfloat16, torch.float16])


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second", "case"),
    one_in(3, ((*pair, case) for pair, case in product(PAIRS, [*product(RULES, [torch.float32]), *HALVES]))),
)
def test_outputs_are_the_same(first: str, second: str, case: tuple[str, torch.dtype], tmp_path: Path) -> None:
    rules, dtype = case
    layers = HELD[first] & HELD[second] - ({"embed_tokens"} if "dora" in rules else set())
    tokens = torch.arange(8).view(2, 4)
    model = net(dtype)
    base = model(tokens)
    named = RULES[rules]
    chosen = {layer: named.get(layer, named[None]) for layer in sorted(layers)}
    patch = adapters.inject(model, chosen)
    perturb(patch)
    expected = model(tokens)
    source = patch
    for step, form in enumerate((first, second)):
        path = tmp_path / (f"{step}.safetensors" if form == "lycoris" else str(step))
        source.save_pretrained(path, format=form)
        source.eject()
        source = adapters.load(model, path)
        assert sorted(source.targets) == sorted(layers)
    assert torch.equal(expected, base) == (rules == "an alpha of 0")
    if any(rules in FOLDED.get(form, ()) for form in (first, second)):
        tolerance = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(model(tokens), expected, atol=tolerance, rtol=tolerance)
    else:
        assert torch.equal(model(tokens), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second"), product(("peft", "diffusers", "lycoris"), ("fluxion", "peft", "diffusers", "lycoris", "mlx"))
)
def test_files_without_an_alpha(first: str, second: str, tmp_path: Path) -> None:
    """It stands for the rank, but for 8 with PEFT."""
    up, down, model = torch.randn(7, 2), torch.randn(2, 6), net(torch.float32)
    names = {"peft": "base_model.model.fc.lora_{}.weight", "diffusers": "unet.fc.lora_{}.weight"}
    if first == "lycoris":
        tensors = {"lycoris_fc.lora_up.weight": up, "lycoris_fc.lora_down.weight": down}
    else:
        tensors = {names[first].format("A"): down, names[first].format("B"): up}
    file = "adapter_model.safetensors" if first == "peft" else "file.safetensors"
    path = weights.save(tensors, tmp_path / file)
    if first == "peft":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["fc"]}')
    patch = adapters.load(model, path, component="unet" if first == "diffusers" else None)
    out = tmp_path / ("out.safetensors" if second == "lycoris" else "out")
    patch.save_pretrained(out, format=second)
    patch.eject()
    before = model.fc.weight.clone()
    adapters.load(model, out).merge_and_eject()
    scale = 4 if first == "peft" else 1
    torch.testing.assert_close(model.fc.weight, before + scale * up @ down, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_converted_without_a_model(first: str, second: str, tmp_path: Path) -> None:
    """What a format says of itself in a file is not in the file of another format."""
    model = net(torch.float32)
    patch = adapters.inject(model, LoRA(rank=2, alpha=4), ["fc", "out"])
    perturb(patch)
    paths = [
        tmp_path / (f"{step}.safetensors" if form == "lycoris" else step)
        for step, form in zip("ab", (first, second), strict=True)
    ]
    source = weights.read_adapter(patch.save_pretrained(paths[0], format=first))
    if source.flattened:
        source = replace(source, flattened=False)  # As no name here has a dot.
    again = weights.read_adapter(weights.write_adapter(source, paths[1], format=second))
    assert again.format == second
    for path, layer in source.layers.items():
        assert all(torch.equal(tensor, again.layers[path].tensors[name]) for name, tensor in layer.tensors.items())
