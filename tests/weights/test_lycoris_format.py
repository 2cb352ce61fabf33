"""The format of LyCORIS and kohya's scripts: the names of layers, and the numbers that are not what they seem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
import weights
from adapters import LayerMismatchError, LoKr, LoRA
from tests.adapters.models import perturb, snapshot

LORA = {"lora_up.weight": (5, 2), "lora_down.weight": (2, 4)}
LOHA = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 4), "hada_w2_a": (5, 2), "hada_w2_b": (2, 4)}
LOKR = {"lokr_w1": (1, 2), "lokr_w2": (5, 2)}


def file(path: Path, layers: dict[str, dict[str, tuple[int, ...]]], **numbers: float | Tensor) -> Path:
    """A file of random tensors of these shapes, all layers with the same numbers beside them."""
    tensors: dict[str, Tensor] = {}
    for stem, shapes in layers.items():
        tensors |= {f"{stem}.{end}": torch.randn(shape) for end, shape in shapes.items()}
        tensors |= {f"{stem}.{name}": torch.as_tensor(value) for name, value in numbers.items()}
    return weights.save(tensors, path / "file.safetensors")


def only(path: Path) -> weights.LayerWeights:
    (layer,) = weights.read_adapter(path).layers.values()
    return layer


# Alpha


@pytest.mark.parametrize("shapes", [LORA, LOHA])
@pytest.mark.parametrize(
    ("numbers", "alpha"),
    [({}, 2.0), ({"alpha": 0.0}, 2.0), ({"alpha": 3.0}, 3.0), ({"alpha": torch.tensor([1.5]).bfloat16()}, 1.5)],
)
def test_no_alpha_and_an_alpha_of_0_stand_for_the_rank(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], numbers: dict[str, Any], alpha: float
) -> None:
    path = file(tmp_path, {"lycoris_fc": shapes}, **numbers)
    hyperparameters = only(path).hyperparameters
    assert (hyperparameters["rank"], hyperparameters["alpha"]) == (2, alpha)
    model, x = nn.ModuleDict({"fc": nn.Linear(4, 5)}), torch.randn(3, 4)
    adapters.load(model, path)
    t = {key.removeprefix("lycoris_fc."): tensor for key, tensor in weights.open(path).items()}
    delta = t["lora_up.weight"] @ t["lora_down.weight"] if shapes is LORA else None
    if delta is None:
        delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    layer = model["fc"].base
    torch.testing.assert_close(model["fc"](x), layer(x) + alpha / 2 * x @ delta.T)


def test_the_alpha_of_two_full_kronecker_factors_is_of_no_account(tmp_path: Path) -> None:
    path = file(tmp_path, {"lycoris_fc": LOKR}, alpha=100000.0)
    model, x = nn.ModuleDict({"fc": nn.Linear(4, 5)}), torch.randn(3, 4)
    adapters.load(model, path)
    t = weights.open(path)
    delta = torch.kron(t["lycoris_fc.lokr_w1"], t["lycoris_fc.lokr_w2"])
    torch.testing.assert_close(model["fc"](x), model["fc"].base(x) + x @ delta.T)


def test_what_cannot_be_said_by_alpha_goes_into_a_factor(tmp_path: Path) -> None:
    for method, factor in ((LoKr(rank=8, alpha=2), "lokr_w1"), (LoRA(rank=2, alpha=0), "lora_up.weight")):
        model, x = nn.ModuleDict({"fc": nn.Linear(4, 5)}).bfloat16(), torch.randn(3, 4).bfloat16()
        patch = adapters.inject(model, method)
        perturb(patch)
        expected = model["fc"](x)
        path = patch.save_pretrained(tmp_path / "file.safetensors", format="lycoris")
        saved = weights.open(path)
        assert saved["lycoris_fc.alpha"] == method.rank
        assert saved[f"lycoris_fc.{factor}"].dtype == torch.float32  # Halves would be rounded.
        patch.eject()
        adapters.load(model, path)
        torch.testing.assert_close(model["fc"](x), expected)


def test_rslora_becomes_plain_lora(tmp_path: Path) -> None:
    """LyCORIS saves its own in this way: the alpha is that of plain LoRA of the same strength."""
    model = nn.ModuleDict({"fc": nn.Linear(4, 5)})
    for rank, alpha in ((4, 2.0), (3, 5.0)):
        patch = adapters.inject(model, LoRA(rank=rank, alpha=alpha, rslora=True))
        path = patch.save_pretrained(tmp_path / "file.safetensors", format="lycoris")
        patch.eject()
        assert weights.open(path)["lycoris_fc.alpha"].shape == ()
        assert only(path).hyperparameters == {"rank": rank, "alpha": alpha * math.sqrt(rank)}


# The names of layers


class Twisted(nn.Module):
    """Whether a `_` in a flattened name was a `.` is different for each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 5)
        self.mid_block = nn.ModuleList([nn.ModuleDict({"proj_in": nn.Linear(4, 5), "fc": nn.Linear(4, 5)})])


def test_flattened_names_are_those_of_the_model(tmp_path: Path) -> None:
    model = Twisted()
    patch = adapters.inject(model, LoRA(rank=2))
    perturb(patch)
    path = patch.save_pretrained(tmp_path / "file.safetensors", format="lycoris")
    assert {key.partition(".")[0] for key in weights.open(path)} == {
        "lycoris_to_q",
        "lycoris_mid_block_0_proj_in",
        "lycoris_mid_block_0_fc",
    }
    state = patch.state_dict()
    patch.eject()
    loaded = adapters.load(model, path)
    assert list(loaded.targets) == ["to_q", "mid_block.0.proj_in", "mid_block.0.fc"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_names_that_are_the_same_when_flattened_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"x_q": nn.Linear(4, 5), "x": nn.ModuleDict({"q": nn.Linear(4, 5)})})
    path = file(tmp_path, {"lycoris_x_q": LORA})
    before = snapshot(model)
    with pytest.raises(LayerMismatchError, match=r"x_q may be x_q or x\.q"):
        adapters.load(model, path)
    assert snapshot(model) == before
    with pytest.raises(weights.FileFormatError, match=r"x_q and x\.q have the same name in it, lycoris_x_q"):
        adapters.inject(model, LoRA(rank=1)).save_pretrained(tmp_path / "mine.safetensors", format="lycoris")
    assert not (tmp_path / "mine.safetensors").exists()
    # Elsewhere in the model it does not matter.
    model["fc"] = nn.Linear(4, 5)
    adapters.load(model, file(tmp_path, {"lycoris_fc": LORA}))


def test_layers_that_the_model_does_not_have_are_listed(tmp_path: Path) -> None:
    path = file(tmp_path, {"lycoris_to_q": LORA, "lycoris_mid_block_1_fc": LORA, "lycoris_mid_block_0": LORA})
    model = Twisted()
    before = snapshot(model)
    with pytest.raises(LayerMismatchError, match=r"is for another model: .*there is no layer mid_block_1_fc"):
        adapters.load(model, path)
    with pytest.raises(LayerMismatchError, match=r"mid_block.0: a ModuleDict cannot have lora"):
        adapters.load(model, path, strict=False)
    assert snapshot(model) == before
    path = file(tmp_path, {"lycoris_to_q": LORA, "lycoris_mid_block_1_fc": LORA})
    patch = adapters.load(model, path, strict=False)
    assert list(patch.targets) == ["to_q"]
    assert patch.skipped == ("mid_block_1_fc",)


# Files for several models


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = Twisted()
        self.text_encoder = nn.ModuleDict({"fc_1": nn.Linear(4, 5)})
        self.text_encoder_2 = nn.ModuleDict({"fc_1": nn.Linear(4, 5)})


KOHYA = {"lora_unet_mid_block_0_fc": LORA, "lora_te1_fc_1": LORA, "lora_te2_fc_1": LORA}


def test_a_part_of_a_file_for_several_models(tmp_path: Path) -> None:
    path = file(tmp_path, KOHYA)
    adapter = weights.read_adapter(path)
    assert list(adapter.layers) == ["text_encoder.fc_1", "text_encoder_2.fc_1", "unet.mid_block_0_fc"]
    assert adapter.components == ("text_encoder", "text_encoder_2", "unet")
    pipeline = Pipeline()
    assert list(adapters.load(pipeline, path, name="whole").targets) == [
        "unet.mid_block.0.fc",
        "text_encoder.fc_1",
        "text_encoder_2.fc_1",
    ]
    for component, stem, layer in (
        ("unet", "lora_unet_mid_block_0_fc", "mid_block.0.fc"),
        ("text_encoder", "lora_te1_fc_1", "fc_1"),
        ("text_encoder_2", "lora_te2_fc_1", "fc_1"),
    ):
        model = getattr(Pipeline(), component)
        loaded = adapters.load(model, path, component=component)
        assert list(loaded.targets) == [layer]
        assert torch.equal(
            loaded.state_dict()[f"{layer}.lora_A.weight"], weights.open(path)[f"{stem}.lora_down.weight"]
        )


def test_a_model_that_is_one_of_several_has_to_be_told(tmp_path: Path) -> None:
    path = file(tmp_path, KOHYA)
    choose = r"choose one with component=, out of text_encoder, text_encoder_2, unet"
    with pytest.raises(LayerMismatchError, match=rf"{choose}: there is no layer text_encoder.fc_1"):
        adapters.load(Pipeline().unet, path)
    with pytest.raises(LayerMismatchError, match=rf"{choose}: text_encoder.fc_1 and text_encoder_2.fc_1 are both for"):
        adapters.load(Pipeline().text_encoder, path)
    with pytest.raises(LayerMismatchError, match=r"nothing for 'vae': its components are text_enc.*, unet"):
        adapters.load(Pipeline(), path, component="vae")
    # What is for no layer is of no account to who wants a part.
    embeddings = weights.save(
        {**weights.open(path), "bundle_emb.x.clip_l": torch.ones(1, 4)}, tmp_path / "emb.safetensors"
    )
    with pytest.raises(LayerMismatchError, match="bundle_emb"):
        adapters.load(Pipeline(), embeddings)
    assert list(adapters.load(Pipeline().unet, embeddings, component="unet").targets) == ["mid_block.0.fc"]
    # A file for one model needs no word.
    adapters.load(Pipeline().unet, file(tmp_path, {"lora_unet_to_q": LORA}))


def test_everything_comes_back(tmp_path: Path) -> None:
    for layers in (KOHYA, {"lora_te_fc": LOHA, "lora_transformer_fc": LOKR}, {"lycoris_a_b": LORA, "lycoris_c": LOHA}):
        path = file(tmp_path, layers, alpha=2.0)
        again = weights.write_adapter(weights.read_adapter(path), tmp_path / "again.safetensors", format="lycoris")
        one, other = weights.open(path), weights.open(again)
        assert one.keys() == other.keys()
        different = {key for key in one if not torch.equal(one[key], other[key])}
        assert different <= {"lora_transformer_fc.alpha"}  # It is of no account.
    weights.save(dict(weights.open(path)), path, {"ss_v2": "False"})
    assert weights.read_adapter(path).metadata == {"ss_v2": "False"}
    again = weights.write_adapter(weights.read_adapter(path), tmp_path / "again.safetensors", format="lycoris")
    assert weights.open(again).metadata == {"ss_v2": "False"}


# Other methods


def write(layers: dict[str, weights.LayerWeights], path: Path) -> dict[str, Tensor]:
    return dict(weights.open(weights.write_adapter(weights.AdapterFile(layers), path, "lycoris")))


def test_the_lengths_of_a_decomposed_weight_are_those_of_its_rows(tmp_path: Path) -> None:
    """PEFT holds them as a vector, or for a convolution as its outputs have them; LyCORIS as the weight has them."""
    conv = {"lora_up.weight": (5, 2, 1, 1), "lora_down.weight": (2, 4, 3, 2)}
    for shapes, there, here in ((LORA, (5, 1), (5,)), (conv, (5, 1, 1, 1), (1, 5, 1, 1))):
        path = file(tmp_path, {"lycoris_fc": {**shapes, "dora_scale": there}}, alpha=3.0)
        layer = only(path)
        assert (layer.method, layer.hyperparameters) == ("dora", {"rank": 2, "alpha": 3.0})
        assert layer.tensors["lora_magnitude_vector"].shape == here
        again = write({"fc": layer}, tmp_path / "again.safetensors")
        assert all(torch.equal(tensor, again[key]) for key, tensor in weights.open(path).items())
    for method, shapes in (("doha", LOHA), ("dokr", LOKR)):
        path = file(tmp_path, {"lycoris_fc": {**shapes, "dora_scale": (5, 1)}})
        assert only(path).method == method


@pytest.mark.parametrize("shapes", [LORA, LOHA, LOKR])
def test_lengths_may_be_those_of_the_inputs(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    path = file(tmp_path, {"lycoris_fc": {**shapes, "dora_scale": (1, 4)}})
    layer = only(path)
    assert layer.hyperparameters["on_inputs"] is True
    again = write({"fc": layer}, tmp_path / "again.safetensors")
    assert torch.equal(again["lycoris_fc.dora_scale"], weights.open(path)["lycoris_fc.dora_scale"])
    for format in ("peft", "diffusers", "mlx"):  # Which have those of outputs only, or none at all.
        with pytest.raises(weights.FileFormatError):
            weights.write_adapter(weights.AdapterFile({"fc": layer}), tmp_path / "out", format)
    path = file(tmp_path, {"lycoris_fc": {**shapes, "dora_scale": (5, 4)}})
    with pytest.raises(weights.FileFormatError, match=r"\(5, 4\), neither for the outputs nor for the inputs"):
        weights.read_adapter(path)


def test_biases_are_layers_of_their_own_here(tmp_path: Path) -> None:
    shapes = {
        "lora_unet_fc": {"diff": (5, 4), "diff_b": (5,)},
        "lora_unet_norm": {"w_norm": (4,), "b_norm": (4,)},
        "lora_unet_q": {**LORA, "diff_b": (5,)},
    }
    path = file(tmp_path, shapes)
    adapter = weights.read_adapter(path)
    assert {name: layer.method for name, layer in adapter.layers.items()} == {
        "unet.fc": "full",
        "unet.fc_bias": "full",
        "unet.norm": "full",
        "unet.norm_bias": "full",
        "unet.q": "lora",
        "unet.q_bias": "full",
    }
    stored = weights.open(path)
    assert torch.equal(adapter.layers["unet.norm_bias"].tensors["diff"], stored["lora_unet_norm.b_norm"])
    with pytest.raises(weights.FileFormatError, match=r"'unet\.q_bias' has a bias without the weight of 'unet\.q'"):
        weights.write_adapter(adapter, tmp_path / "again.safetensors", "lycoris")
    # By their names in a model, and flattened.
    for dot, flattened in (("_", True), (".", False)):
        layers = {
            name.replace("_bias", f"{dot}bias"): layer for name, layer in adapter.layers.items() if "q" not in name
        }
        if not flattened:
            layers = {name.removeprefix("unet."): layer for name, layer in layers.items()}
        again = weights.AdapterFile(layers, flattened=flattened, components=("unet",) * flattened)
        weights.write_adapter(again, tmp_path / "again.safetensors", "lycoris")
        prefix = "lora_unet" if flattened else "lycoris"
        other = weights.open(tmp_path / "again.safetensors")
        expected = {
            key.replace("lora_unet", prefix): tensor
            for key, tensor in stored.items()
            if not key.startswith("lora_unet_q")
        }
        assert other.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in other.items())


@pytest.mark.parametrize("on_input", [0, 1])
def test_factors_of_ia3_are_near_1_and_leave_the_bias(tmp_path: Path, on_input: int) -> None:
    for shape in ((4,), (1, 4, 1, 1)):
        path = file(tmp_path, {"lycoris_fc": {"weight": shape}}, on_input=torch.tensor(on_input))
        layer = only(path)
        numbers = {"feedforward": True} if on_input else {"feedforward": False, "bias": False}
        assert (layer.method, layer.hyperparameters) == ("ia3", numbers)
        added = weights.open(path)["lycoris_fc.weight"]
        torch.testing.assert_close(layer.tensors["ia3_l"].flatten(), 1 + added.flatten())
        again = write({"fc": layer}, tmp_path / "again.safetensors")
        assert again["lycoris_fc.on_input"] == on_input and again["lycoris_fc.weight"].shape == shape
        torch.testing.assert_close(again["lycoris_fc.weight"], added)
    outputs = weights.LayerWeights("ia3", {"feedforward": False}, {"ia3_l": torch.ones(4, 1)})
    with pytest.raises(weights.FileFormatError, match="which LyCORIS leaves as it is: train with bias=False"):
        write({"fc": outputs}, tmp_path / "again.safetensors")
    left = weights.LayerWeights("ia3", {"feedforward": False, "bias": False}, {"ia3_l": torch.ones(4, 1)})
    with pytest.raises(weights.FileFormatError, match="leave the bias as it is, where PEFT's do not"):
        weights.write_adapter(weights.AdapterFile({"fc": left}), tmp_path / "peft", format="peft")


@pytest.mark.parametrize(
    ("shapes", "numbers", "method", "hyperparameters"),
    [
        (
            {"a1.weight": (4, 2), "a2.weight": (2, 4), "b1.weight": (5, 2), "b2.weight": (2, 4)},
            {"alpha": 3.0},
            "lycoris-glora",
            {"rank": 2, "alpha": 3.0},
        ),
        (
            {"oft_blocks": (2, 3, 3)},
            {"alpha": 0.0},
            "diag-oft",
            {"block_size": 3, "constraint": 0.0, "rescale": False},
        ),
        (
            {"oft_blocks": (2, 4, 2, 2), "rescale": (8, 1)},
            {"alpha": 0.25},
            "output-boft",
            {"block_size": 2, "factors": 2, "constraint": 0.25, "rescale": True},
        ),
    ],
)
def test_what_the_tensors_of_other_methods_say(
    tmp_path: Path, shapes: Any, numbers: Any, method: str, hyperparameters: dict[str, Any]
) -> None:
    path = file(tmp_path, {"lycoris_fc": shapes}, **numbers)
    layer = only(path)
    assert (layer.method, layer.hyperparameters) == (method, hyperparameters)
    again = write({"fc": layer}, tmp_path / "again.safetensors")
    stored = weights.open(path)
    assert again.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in again.items())


# Refusals


@pytest.mark.parametrize(
    ("shapes", "numbers", "match"),
    [
        ({"lora_up.weight": (5, 2)}, {}, r"`lycoris_fc\.lora_up\.weight` has no `lycoris_fc\.lora_down\.weight`"),
        (
            {**LORA, "hada_w1_a": (5, 2)},
            {},
            "has hada_w1_a, lora_down.weight, lora_up.weight, which together are of no known method",
        ),
        ({**LOHA, "hada_t1": (2, 2, 3, 3)}, {}, r"`lycoris_fc\.hada_t1` has no `lycoris_fc\.hada_t2`"),
        ({**LORA, "reshape_weight": (2,)}, {}, "a reshape_weight: it makes the weight larger"),
        (LORA, {"alpha": torch.ones(2)}, "an alpha that is not a number"),
        (LORA, {"alpha": math.inf}, "an alpha that is not a number"),
        ({**LORA, "lora_up.weight": ()}, {}, "a tensor that is no matrix"),
        ({**LORA, "lora_down.weight": (0, 4)}, {}, "a tensor that is no matrix"),
        ({**LORA, "lora_mid.weight": (3, 3, 2, 2)}, {}, r"a lora_mid \(3, 3, 2, 2\) that does not fit rank 2"),
        (
            {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)},
            {},
            "factors of the ranks 1, 2",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], numbers: dict[str, Any], match: str
) -> None:
    with pytest.raises(weights.FileFormatError, match=match):
        weights.read_adapter(file(tmp_path, {"lycoris_fc": shapes}, **numbers))


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path, {"lora_unet_fc": LORA, "hypernet": {"clip_l": (2, 4)}})
    with pytest.raises(weights.FileFormatError, match=r"the key 'hypernet\.clip_l' is not expected"):
        weights.read_adapter(path)
    path = file(tmp_path, {"fc": {"weight": (2, 2)}})
    with pytest.raises(weights.FileFormatError, match="holds no adapter in a known format"):
        weights.read_adapter(path)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 5), "embed": nn.Embedding(4, 5)})
    for method, target, match in (
        (LoRA(rank=1, bias=True), "fc", "lora_B.bias, which LyCORIS does not read"),
        (LoRA(rank=1), "embed", "lora_embedding_A, lora_embedding_B, for which there are no names"),
        (
            adapters.Copy(),
            "fc",
            "the method 'copy', which is none of diag-oft, doha, dokr, dora, full, ia3, loha, lokr, lora,",
        ),
    ):
        patch = adapters.inject(model, method, target)
        with pytest.raises(weights.FileFormatError, match=match):
            patch.save_pretrained(tmp_path / "file.safetensors", format="lycoris")
        patch.eject()
    stack = weights.LayerWeights(
        "lora", {"rank": 2, "alpha": 2.0}, {"lora_A": torch.ones(3, 2, 4), "lora_B": torch.ones(3, 5, 2)}
    )
    for layers, options, match in (
        ({"fc": stack}, {}, r"lora_A \(3, 2, 4\) and lora_B \(3, 5, 2\) of rank 2, a shape mismatch"),
        ({}, {}, "it has no layers with an adapter"),
        ({}, {"shared": {"vera_A": torch.ones(2)}}, "it has no place for vera_A"),
    ):
        with pytest.raises(weights.FileFormatError, match=match):
            weights.write_adapter(weights.AdapterFile(layers, **options), tmp_path / "file.safetensors", "lycoris")
    with pytest.raises(weights.FileFormatError, match=r"its name does not end in \.safetensors"):
        adapters.inject(model, LoRA(rank=1), "fc").save_pretrained(tmp_path / "folder", format="lycoris")
    assert not list(tmp_path.iterdir())


def test_peft_does_not_take_flattened_names(tmp_path: Path) -> None:
    adapter = weights.read_adapter(file(tmp_path, {"lycoris_fc": LORA}))
    with pytest.raises(weights.FileFormatError, match="flattened: load it into the model, and save it from there"):
        weights.write_adapter(adapter, tmp_path / "peft")
    model = nn.ModuleDict({"fc": nn.Linear(4, 5)})
    patch = adapters.load(model, tmp_path / "file.safetensors")
    patch.save_pretrained(tmp_path / "peft")
    patch.eject()
    again = adapters.load(model, tmp_path / "peft")
    assert all(torch.equal(tensor, patch.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_core_of_lora_is_multiplied_out(tmp_path: Path) -> None:
    shapes = {"lora_up.weight": (5, 2, 1, 1), "lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 2)}
    path = file(tmp_path, {"lycoris_conv": shapes})
    t = {key.partition(".")[2]: tensor for key, tensor in weights.open(path).items()}
    layer = only(path)
    assert layer.method == "lora" and layer.hyperparameters == {"rank": 2, "alpha": 2.0}
    a, b = layer.tensors["lora_A"], layer.tensors["lora_B"]
    assert (a.shape, b.shape) == ((2, 4, 3, 2), (5, 2, 1, 1))
    whole = torch.einsum("op,pqkl,qc->ockl", b.flatten(1), t["lora_mid.weight"], t["lora_down.weight"].flatten(1))
    torch.testing.assert_close(torch.einsum("op,pckl->ockl", b.flatten(1), a), whole)
