"""Patches in files and on the Hub: what is saved is what is loaded, here and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

import adapters
import weights
from adapters import IA3, OFT, DoRA, LayerMismatchError, LoRA, Method, PatchNameError
from tests.adapters.models import BUILDERS, Case, build, perturb, snapshot
from tests.weights.conftest import hub, hub_home  # noqa: F401
from tests.weights.hub_server import WRITER, HubServer
from weights.tensors.open import encode


@pytest.mark.parametrize("name", BUILDERS)
def test_saved_and_loaded_into_a_fresh_model(name: str, tmp_path: Path) -> None:
    case = build(name)
    patch = adapters.inject(case.model, LoRA(rank=3, alpha=5, rslora=True))
    perturb(patch)
    expected = case()
    assert patch.save_pretrained(tmp_path / "out") == tmp_path / "out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    fresh = build(name)
    before = snapshot(fresh.model)
    loaded = adapters.load(fresh.model, tmp_path / "out")
    assert loaded.name == "out"
    assert torch.equal(fresh(), expected)
    assert list(loaded.state_dict()) == list(patch.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.eject()
    assert snapshot(fresh.model) == before

    trainable = adapters.load(fresh.model, tmp_path / "out", name="mine", trainable=True, scale=0.0)
    assert {id(p) for p in fresh.model.parameters() if p.requires_grad} == {id(p) for p in trainable.parameters()}


def test_each_layer_keeps_its_own_rank_and_alpha(tmp_path: Path) -> None:
    case = build("chain")
    rules = {"Conv2d": LoRA(rank=3, alpha=1), "Linear_1": LoRA(rank=1, alpha=9), "Linear_2": LoRA(rank=2)}
    patch = adapters.inject(case.model, rules)
    perturb(patch)
    expected = case()
    patch.save_pretrained(tmp_path)
    fresh = build("chain")
    adapters.load(fresh.model, tmp_path)
    assert torch.equal(fresh(), expected)


@pytest.mark.parametrize(
    "rules",
    [
        {"query": LoRA(rank=2), "value": IA3()},
        {"query": LoRA(rank=2, dropout=0.1), "value": LoRA(rank=2)},
        {"query": OFT(block_size=4), "value": OFT(block_size=8)},
    ],
)
def test_what_pefts_format_cannot_hold_is_saved_in_our_own(rules: dict[str, Method], tmp_path: Path) -> None:
    case = build("bert")
    patch = adapters.inject(case.model, rules)
    perturb(patch)
    expected = case()
    patch.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter.safetensors"]
    patch.eject()
    adapters.load(case.model, tmp_path)
    assert torch.equal(case(), expected)


def test_the_name_of_a_file_is_no_folder(tmp_path: Path) -> None:
    case = build("plain")
    patch = adapters.inject(case.model, LoRA(rank=2))
    path = tmp_path / "style.safetensors"
    with pytest.raises(weights.FileFormatError, match="its name is that of a file, and PEFT's adapters are folders"):
        patch.save_pretrained(path, format="peft")
    assert not path.exists()
    patch.save_pretrained(path)
    assert path.is_file()
    assert adapters.load(case.model, path).name == "style"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1)
        self.fc = nn.Linear(4 * 4 * 5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def net(seed: int = 0) -> Net:
    torch.default_generator.manual_seed(seed)
    return Net().eval()


def test_peft_loads_what_is_saved_here(tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 3, 8, 8)
    patch = adapters.inject(model, {"conv": LoRA(rank=2, alpha=3), "fc": LoRA(rank=4, alpha=8)})
    perturb(patch)
    patch.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model(x))
    assert not torch.allclose(theirs(x), net()(x))


def test_what_peft_saves_is_loaded_here(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["conv", "fc"], rank_pattern={"fc": 2}, alpha_pattern={"conv": 3}, bias="none"
    )
    theirs = peft.get_peft_model(net(), config).eval()
    perturb(theirs)
    base = net().state_dict()
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            parameter.data.copy_(base[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    theirs.save_pretrained(tmp_path)
    model, x = net(), torch.randn(2, 3, 8, 8)
    adapters.load(model, tmp_path)
    torch.testing.assert_close(model(x), theirs(x))
    assert not torch.allclose(model(x), net()(x))


@torch.no_grad()
@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), IA3()])
def test_adapters_of_weights_stored_in_8_bits_are_not_rounded(method: Method, tmp_path: Path) -> None:
    """As diffusers stores them: each layer is in single precision while it runs."""
    stored = torch.float8_e4m3fn
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))
    x = torch.randn(4, 6)
    patch = adapters.inject(model, method)
    perturb(patch)
    expected = model(x)
    patch.save_pretrained(tmp_path)
    patch.eject()
    apply_layerwise_casting(model, storage_dtype=stored, compute_dtype=torch.float32, skip_modules_pattern=None)
    assert model[0].weight.dtype is stored
    adapters.inject(model, method).eject()
    patch = adapters.load(model, tmp_path)
    assert {parameter.dtype for parameter in patch.parameters()} == {torch.float32}
    if not isinstance(method, DoRA):  # Which changes the weight itself, in the dtype that this has.
        torch.testing.assert_close(model(x), expected)
    patch.merge()
    torch.testing.assert_close(model(x), expected, atol=0.2, rtol=0.2)
    patch.eject()
    assert model[0].weight.dtype is stored


def test_a_file_for_another_model_changes_nothing(tmp_path: Path) -> None:
    source = net()
    adapters.inject(source, LoRA(rank=2)).save_pretrained(tmp_path)
    for model, message in [
        (build("bert").model, "there is no layer conv; there is no layer fc"),
        (nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(5, 5)}), r"conv: lora_A is .*2, 3, 3, 2.* in the"),
        (nn.ModuleDict({"conv": nn.Conv2d(3, 4, (3, 2)), "fc": nn.GRU(5, 5)}), "fc: a GRU cannot have lora"),
        (nn.ModuleDict({"conv": nn.Conv2d(3, 4, (3, 2))}), "there is no layer fc"),
    ]:
        before = snapshot(model)
        with pytest.raises(LayerMismatchError, match=message):
            adapters.load(model, tmp_path)
        assert snapshot(model) == before
    partial = nn.ModuleDict({"conv": nn.Conv2d(3, 4, (3, 2))})
    assert list(adapters.load(partial, tmp_path, strict=False).targets) == ["conv"]


def test_wrong_sources_change_nothing(tmp_path: Path) -> None:
    model = net()
    before = snapshot(model)
    (tmp_path / "empty").mkdir()
    other = net()
    patch = adapters.inject(other, LoRA(rank=1))
    patch.save_pretrained(tmp_path / "torn")
    tensors = tmp_path / "torn" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-3])
    for source in ("nowhere/", "empty", "torn"):
        with pytest.raises(weights.WeightsError):
            adapters.load(model, tmp_path / source)
        assert snapshot(model) == before
    patch.save_pretrained(tmp_path / "good")
    adapters.load(model, tmp_path / "good", name="taken")
    with pytest.raises(PatchNameError, match="'taken' already"):
        adapters.load(model, tmp_path / "good", name="taken")


def test_an_unwritable_folder_is_left_alone(tmp_path: Path) -> None:
    model = net()
    patch = adapters.inject(model, LoRA(rank=1))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(weights.WeightsError, match="file"):
        patch.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_published_and_loaded_from_the_hub(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    case = build("bert")
    case.model.config.name_or_path = "someone/tiny-bert"
    patch = adapters.inject(case.model, LoRA(rank=2), targets=["query", "value"], name="style")
    perturb(patch)
    expected = case()
    address = patch.push_to_hub("me/style-lora", token=WRITER)
    assert "me/style-lora" in address
    fresh: Case = build("bert")
    loaded = adapters.load(fresh.model, "me/style-lora")
    assert loaded.name == "style-lora"
    assert torch.equal(fresh(), expected)
    card = (weights.download("me/style-lora") / "README.md").read_text()
    assert "base_model: someone/tiny-bert" in card
    config = json.loads((weights.download("me/style-lora") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny-bert"


@pytest.mark.parametrize(
    ("format", "file", "snippet"),
    [
        (None, "adapter_model.safetensors", "PeftModel.from_pretrained"),
        ("diffusers", "pytorch_lora_weights.safetensors", 'load_lora_weights("me/style-lora")'),
        ("lycoris", "style-lora.safetensors", 'adapters.load(model, "me/style-lora")'),
        ("mlx", "adapters.safetensors", 'adapters.load(model, "me/style-lora")'),
        ("fluxion", "adapter.safetensors", 'adapters.load(model, "me/style-lora")'),
    ],
)
def test_every_format_is_published(hub: HubServer, format: str | None, file: str, snippet: str) -> None:  # noqa: F811
    case, fresh = build("bert"), build("bert")
    patch = adapters.inject(case.model, LoRA(rank=2), targets=["query", "value"])
    perturb(patch)
    patch.push_to_hub("me/style-lora", token=WRITER, format=format, license="mit")
    folder = weights.download("me/style-lora")
    assert (folder / file).exists()
    card = (folder / "README.md").read_text()
    assert snippet in card
    assert "license: mit" in card
    adapters.load(fresh.model, "me/style-lora")
    assert torch.equal(fresh(), case())


def test_a_limit_of_size_holds_before_the_download(hub: HubServer) -> None:  # noqa: F811
    model = build("bert").model
    patch = adapters.inject(model, LoRA(rank=2))
    patch.push_to_hub("me/style-lora", token=WRITER)
    hub.requests.clear()
    with pytest.raises(weights.FileFormatError, match="and 1,000 are allowed"):
        weights.read_adapter("me/style-lora", max_bytes=1000)
    assert not any("/resolve/" in request for _, request, _ in hub.requests)


def test_a_pickle_comes_from_the_hub_on_request(hub: HubServer, tmp_path: Path) -> None:  # noqa: F811
    model = net()
    adapters.inject(model, LoRA(rank=2), name="x").save_pretrained(tmp_path)
    torch.save(dict(weights.open(tmp_path)), tmp_path / "adapter_model.bin")
    names = ("adapter_config.json", "adapter_model.bin")
    hub.add("me/old", {name: (tmp_path / name).read_bytes() for name in names})
    with pytest.raises(weights.FileFormatError, match="pickle=True"):
        weights.read_adapter("me/old")
    adapters.load(model, weights.read_adapter("me/old", pickle=True))


def test_tensors_of_any_name_come_with_the_settings_beside_them(hub: HubServer) -> None:  # noqa: F811
    """As torchtune's do."""
    a, b = torch.ones(2, 6), torch.ones(6, 2)
    tensors = {"fc.lora_a.weight": a, "fc.lora_b.weight": b}
    content = b"".join(bytes(chunk) for chunk in encode(tensors))
    hub.add("me/tuned", {"adapter_config.json": b'{"r": 2, "lora_alpha": 4}', "adapter_0.safetensors": content})
    assert weights.read_adapter("me/tuned").layers["fc"].hyperparameters["alpha"] == 4


def test_kohya_is_another_name_of_lycoris(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    patch = adapters.inject(model, LoRA(rank=2), seed=0)
    for name in ("lycoris", "kohya"):
        patch.save_pretrained(tmp_path / f"{name}.safetensors", format=name)
    assert (tmp_path / "kohya.safetensors").read_bytes() == (tmp_path / "lycoris.safetensors").read_bytes()
    sources = {tmp_path / "kohya.safetensors": 1.0}
    for name in ("lycoris", "kohya"):
        assert adapters.combine_files(sources, tmp_path / f"{name}2.safetensors", format=name).format == "lycoris"
    assert "model.safetensors" not in patch.push_to_hub("me/style", format="kohya", dry_run=True)
