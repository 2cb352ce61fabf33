"""Files of cloneofsimo/lora: numbers that stand for layers, counted in a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
import weights
from adapters import LayerMismatchError
from tests.adapters.models import snapshot
from tests.adapters.pipeline import pipeline
from tests.weights.test_hostile_adapters import CHANGES, VALUES, attempt

UNET, TEXT = ["CrossAttention", "Attention", "GEGLU"], ["CLIPAttention"]


def counted(model: nn.Module, classes: Iterable[str], kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The layers as that library finds them: of each module of these classes, all below it."""
    return {
        f"{above}.{name}": module
        for above, holder in model.named_modules()
        if type(holder).__name__ in classes
        for name, module in holder.named_modules()
        if isinstance(module, kinds)
    }


def factors(layers: Iterable[nn.Module], rank: int = 3) -> list[tuple[Tensor, Tensor]]:
    found: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        shape = layer.weight.shape
        ones = (1,) * (len(shape) - 2)
        found.append((torch.randn(shape[0], rank, *ones) * 0.2, torch.randn(rank, *shape[1:]) * 0.2))
    return found


def file(path: Path, **parts: tuple[list[str], list[tuple[Tensor, Tensor]]]) -> Path:
    """As `save_safeloras` writes it."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, (classes, pairs) in parts.items():
        metadata[name] = json.dumps(classes)
        for number, (up, down) in enumerate(pairs):
            metadata[f"{name}:{number}:rank"] = str(down.shape[0])
            tensors |= {f"{name}:{number}:up": up, f"{name}:{number}:down": down}
    return weights.save(tensors, path / "lora_weight.safetensors", metadata)


@torch.no_grad()
def add(layers: Iterable[nn.Module], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """W + up down, at a scale of 1."""
    for layer, (up, down) in zip(layers, pairs, strict=True):
        layer.weight += (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


@pytest.mark.parametrize("extended", [False, True])
def test_numbers_are_those_of_the_layers_in_the_model(tmp_path: Path, extended: bool) -> None:
    mine, other = pipeline(), pipeline()
    classes = ["ResnetBlock2D", *UNET] if extended else UNET
    kinds = (nn.Linear, nn.Conv2d) if extended else (nn.Linear,)
    image, text = counted(other.pipe.unet, classes, kinds), counted(other.pipe.text_encoder, TEXT, (nn.Linear,))
    parts = {"unet": (classes, factors(image.values())), "text_encoder": (TEXT, factors(text.values()))}
    path = file(tmp_path, **parts)
    base = mine()
    patch = adapters.load(mine.pipe, path)
    assert set(patch.targets) == {*(f"unet.{at}" for at in image), *(f"text_encoder.{at}" for at in text)}
    add(image.values(), parts["unet"][1])
    add(text.values(), parts["text_encoder"][1])
    for out, expected, before in zip(mine(), other(), base, strict=True):
        assert (expected - before).abs().max() > 1e-2
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    patch.eject()
    # One of the models by itself.
    patch = adapters.load(mine.pipe.unet, path, component="unet")
    torch.testing.assert_close(mine()[0], other()[0], atol=1e-4, rtol=1e-4)
    # It is saved by the names of the layers.
    saved = patch.save_pretrained(tmp_path / "mine.safetensors", format="fluxion")
    patch.eject()
    adapters.load(mine.pipe.unet, saved)
    torch.testing.assert_close(mine()[0], other()[0], atol=1e-4, rtol=1e-4)


def test_blocks_once_had_their_second_attention_last(tmp_path: Path) -> None:
    """That was so when the library was written; here the feed-forward comes last."""
    mine, other = pipeline().pipe.unet, pipeline().pipe.unet
    now = counted(other, UNET, (nn.Linear,))
    blocks = list(dict.fromkeys(at.split(".attn")[0].split(".ff")[0] for at in now))
    then = [
        at for block in blocks for part in ("attn1", "ff", "attn2") for at in now if at.startswith(f"{block}.{part}")
    ]
    assert sorted(then) == sorted(now) and then != list(now)
    pairs = factors(now[at] for at in then)
    patch = adapters.load(mine, file(tmp_path, unet=(UNET, pairs)))
    assert set(patch.targets) == set(now)
    add((now[at] for at in then), pairs)
    patch.merge()
    for at, layer in now.items():
        torch.testing.assert_close(mine.get_submodule(at).base.weight, layer.weight)


@pytest.mark.parametrize("old", ["CrossAttention", "Attention"])
def test_classes_by_the_names_of_other_versions(tmp_path: Path, old: str) -> None:
    unet = pipeline().pipe.unet
    pairs = factors(counted(unet, ["Attention"], (nn.Linear,)).values())
    assert len(adapters.load(unet, file(tmp_path, unet=([old], pairs))).targets) == len(pairs)


def test_numbers_that_do_not_fit_a_model_are_refused(tmp_path: Path) -> None:
    unet = pipeline().pipe.unet
    pairs = factors(counted(unet, UNET, (nn.Linear,)).values())
    before = snapshot(unet)
    wrong = [pairs[:-1], [*pairs, pairs[-1]], [pairs[-1], *pairs[1:-1], pairs[0]]]
    for path in (file(tmp_path, unet=(UNET, some)) for some in wrong):
        with pytest.raises(LayerMismatchError, match=r"there is no layer unet\.0"):
            adapters.load(unet, path)
        with pytest.raises(LayerMismatchError, match=r"there is no layer"):
            adapters.load(unet, path, strict=False)
    path = file(tmp_path, unet=(UNET, pairs), text_encoder=(TEXT, pairs[:1]))
    with pytest.raises(LayerMismatchError, match=r"choose one with component=, out of text_encoder, unet"):
        adapters.load(unet, path)
    assert snapshot(unet) == before
    with pytest.raises(weights.FileFormatError, match="which only its model resolves"):
        weights.write_adapter(weights.read_adapter(path), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"<s2>": torch.ones(4)}, "'<s2>' is not expected"),
        ({"unet:x:up": torch.ones(4, 2)}, "'unet:x:up' is not expected"),
        ({"unet:1:up": torch.ones(4, 2)}, "`unet:1:up` has no `unet:1:down`"),
        ({"unet:0:up": torch.ones(4, 3)}, r"down \(2, 5\) and up \(4, 3\), a shape mismatch"),
        ({"unet:0:up": torch.ones(4)}, r"down \(2, 5\) and up \(4,\), a shape mismatch"),
        ({"vae:0:up": torch.ones(4, 2), "vae:0:down": torch.ones(2, 4)}, "does not say what layers of 'vae'"),
    ],
)
def test_what_else_is_in_a_file_is_refused(tmp_path: Path, change: dict[str, Tensor], said: str) -> None:
    path = file(tmp_path, unet=(["Attention"], [(torch.ones(4, 2), torch.ones(2, 5))]))
    content = weights.open(path)
    weights.save({**content, **change}, path, {**content.metadata, "<s1>": "<embed>"})
    with pytest.raises(weights.FileFormatError, match=said):
        weights.read_adapter(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "null", "[" * 5000])
def test_a_list_of_classes_that_is_none(tmp_path: Path, text: str) -> None:
    path = file(tmp_path, unet=(["Attention"], [(torch.ones(4, 2), torch.ones(2, 5))]))
    weights.save(dict(weights.open(path)), path, {"unet": text})
    with pytest.raises(weights.FileFormatError, match="does not say what layers of 'unet' were counted"):
        weights.read_adapter(path)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(6, 4), nn.Linear(4, 5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.attn = nn.Embedding(8, 6), Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn.to_k(self.attn.to_q(self.emb(tokens)))


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_typed_error_or_a_patch_that_runs(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = file(Path(folder), unet=(["Attention"], factors(counted(Net(), ["Attention"], (nn.Linear,)).values())))
        content = weights.open(path)
        tensors, metadata = dict(content), dict(content.metadata)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.sampled_from(sorted(tensors)))
            what = data.draw(st.sampled_from(["tensor", "tensor", "drop", "rename", "metadata"]))
            if what == "tensor":
                tensors[at] = data.draw(st.sampled_from(CHANGES))(tensors[at])
            elif what == "drop" and len(tensors) > 1:
                del tensors[at]
            elif what == "rename":
                names = ["unet:7:up", "unet:999999999999:up", "x:0:down", ":0:up", "unet:-1:up", "unet:01:up", "unet::"]
                tensors[data.draw(st.sampled_from(names))] = tensors.pop(at)
            elif what == "metadata":
                metadata["unet"] = data.draw(VALUES.map(lambda value: json.dumps(value)) | st.text(max_size=5))
        weights.save(tensors, path, metadata)
        attempt(Net().eval(), path)
