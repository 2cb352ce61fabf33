"""Files of LoRA for pipelines, both ways between here and the real diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import adapters
import weights
from adapters import DoRA, LoRA
from tests.adapters.models import perturb
from tests.adapters.pipeline import Pipeline, pipeline, pipeline_xl


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings(action="ignore"):
        yield


NAME = "pytorch_lora_weights.safetensors"


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def trained(**settings: object) -> tuple[Pipeline, list[Tensor]]:
    """A pipeline with adapters of PEFT in it, and what it computes."""
    case = pipeline()
    torch.default_generator.manual_seed(1)
    common = {"init_lora_weights": False, **settings}
    case.pipe.unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "conv1", "conv_in"], **common)
    )
    case.pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"], **common))
    return case, case()


def states(case: Pipeline) -> dict[str, dict[str, Tensor]]:
    """The tensors of PEFT's adapters in each model."""
    return {name: get_peft_model_state_dict(getattr(case.pipe, name)) for name in ("unet", "text_encoder")}


def written(case: Pipeline, folder: Path, *, metadata: bool) -> Path:
    """What diffusers writes."""
    models = {"unet": case.pipe.unet, "text_encoder": case.pipe.text_encoder}
    case.pipe.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": state for name, state in states(case).items()},
        **(_collate_lora_metadata(models) if metadata else {}),
    )
    return folder


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"to_q": 3}}])
def test_a_file_of_diffusers_is_read(tmp_path: Path, settings: dict[str, object]) -> None:
    case, expected = trained(**settings)
    ours = pipeline()
    patch = adapters.load(ours.pipe, written(case, tmp_path, metadata=True))
    assert_close(ours(), expected)
    assert {path.partition(".")[0] for path in patch.targets} == {"unet", "text_encoder"}


def test_without_metadata_the_scale_is_1_here_and_there(tmp_path: Path) -> None:
    case, _ = trained()
    folder = written(case, tmp_path, metadata=False)
    theirs, ours = pipeline(), pipeline()
    theirs.pipe.load_lora_weights(str(folder))
    adapters.load(ours.pipe, folder)
    assert_close(ours(), theirs())


LORAS = [LoRA(rank=4, alpha=8), LoRA(rank=3, alpha=2, rslora=True)]
PARTS = [["unet"], ["text_encoder"], ["unet", "text_encoder"]]


# It does not read the DoRA of a text encoder that it has written itself.
@pytest.mark.parametrize(
    ("method", "parts"), [*((lora, parts) for lora in LORAS for parts in PARTS), (DoRA(rank=2, alpha=4), ["unet"])]
)
def test_diffusers_reads_what_is_written(tmp_path: Path, method: adapters.Method, parts: list[str]) -> None:
    ours, theirs = pipeline(), pipeline()
    # Of text encoders, diffusers reads only files that have layers of the attention, whatever else is in them.
    targets = {"unet": ["unet.**.to_*"], "text_encoder": ["text_encoder.**.*_proj", "text_encoder.**.fc*"]}
    patch = adapters.inject(ours.pipe, method, [target for part in parts for target in targets[part]])
    perturb(patch)
    theirs.pipe.load_lora_weights(str(patch.save_pretrained(tmp_path, format="diffusers")))
    assert_close(theirs(), ours())


def test_ranks_and_alphas_of_layers_survive(tmp_path: Path) -> None:
    ours, theirs = pipeline(), pipeline()
    methods = {"unet.**.attn1.to_q": LoRA(rank=1, alpha=3), "unet.**.to_*": LoRA(rank=4, alpha=2)}
    perturb(adapters.inject(ours.pipe, methods, name="style"))
    folder = adapters.patches(ours.pipe)["style"].save_pretrained(tmp_path, format="diffusers")
    theirs.pipe.load_lora_weights(str(folder))
    assert_close(theirs(), ours())


def test_a_model_alone_knows_its_component(tmp_path: Path) -> None:
    ours, theirs = pipeline(), pipeline()
    patch = adapters.inject(ours.pipe.unet, LoRA(rank=2, alpha=4), "to_q")
    perturb(patch)
    folder = patch.save_pretrained(tmp_path, format="diffusers")
    assert all(key.startswith("unet.") for key in weights.open(folder))
    theirs.pipe.load_lora_weights(str(folder))
    assert_close(theirs(), ours())
    text = adapters.inject(ours.pipe.text_encoder, LoRA(rank=2), "q_proj")
    perturb(text)
    theirs.pipe.load_lora_weights(
        str(text.save_pretrained(tmp_path / "t", format="diffusers", component="text_encoder"))
    )
    assert_close(theirs()[1:], ours()[1:])


def test_a_file_of_a_model_alone(tmp_path: Path) -> None:
    """Without a component, as `save_lora_adapter` writes it."""
    case, expected = trained()
    case.pipe.unet.save_lora_adapter(tmp_path)
    ours = pipeline()
    adapters.load(ours.pipe.unet, tmp_path)
    assert_close(ours()[:1], expected[:1])
    theirs = pipeline()
    bare = weights.read_adapter(tmp_path)
    assert bare.components == ()
    weights.write_adapter(bare, tmp_path / "again", format="diffusers")
    theirs.pipe.unet.load_lora_adapter(str(tmp_path / "again"), prefix=None, weight_name=NAME)
    assert_close(theirs()[:1], expected[:1])


# The older spellings, read by diffusers too

_ENDS = {"lora_A": "down", "lora_B": "up"}


def _newer(key: str, spelled: str) -> str:
    path, end = key.removesuffix(".weight").rsplit(".", 1)
    return f"{path}.{spelled}.{_ENDS[end]}.weight"


def _processors(key: str) -> str:
    """`unet.….attn1.processor.to_out_lora.up.weight`"""
    path, end = key.removesuffix(".weight").rsplit(".", 1)
    attention, name = path.replace(".to_out.0", ".to_out").rsplit(".", 1)
    return f"{attention}.processor.{name}_lora.{_ENDS[end]}.weight"


STYLES: Mapping[str, Callable[[str], str]] = {
    "lora": lambda key: _newer(key, "lora" if key.startswith("unet") else "lora_linear_layer"),
    "processor": lambda key: _processors(key) if ".attn" in key else _newer(key, "lora_linear_layer"),
}


@pytest.mark.parametrize("style", STYLES)
def test_older_files(tmp_path: Path, style: str) -> None:
    case = pipeline()
    torch.default_generator.manual_seed(1)
    for model, names in ((case.pipe.unet, ["to_q", "to_out.0"]), (case.pipe.text_encoder, ["q_proj", "out_proj"])):
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    tensors = {
        STYLES[style](f"{name}.{key}"): tensor for name, state in states(case).items() for key, tensor in state.items()
    }
    weights.save(tensors, tmp_path / NAME)
    theirs, ours = pipeline(), pipeline()
    theirs.pipe.load_lora_weights(str(tmp_path))
    adapters.load(ours.pipe, tmp_path)
    assert_close(ours(), theirs())
    assert_close(ours(), case())


# What does not fit


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"metadata": {"lora_adapter_metadata": "{"}}, "no table in JSON"),
        ({"metadata": {"lora_adapter_metadata": "[]"}}, "no table in JSON"),
        ({"metadata": {"lora_adapter_metadata": '{"unet.r": "x"}'}}, "r='x' is not a number"),
        ({"metadata": {"lora_adapter_metadata": '{"unet.use_magic": true}'}}, "use_magic=True is not supported"),
        ({"metadata": {"lora_adapter_metadata": '{"vae.r": 2}'}}, "not supported"),
        ({"add": "unet.fc.magic"}, "the key 'unet.fc.magic' is not expected"),
        ({"add": "vae.fc.lora_A.weight"}, "the key 'vae.fc.lora_A.weight' is not expected"),
        ({"add": "unet.fc.lora.down.weight"}, "are the same tensor of a layer"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, change: dict[str, object], match: str) -> None:
    tensors = {"unet.fc.lora_A.weight": torch.ones(2, 4), "unet.fc.lora_B.weight": torch.ones(4, 2)}
    if "add" in change:
        tensors[str(change["add"])] = torch.ones(2, 4)
    path = weights.save(tensors, tmp_path / "x.safetensors", change.get("metadata"))  # type: ignore[arg-type]
    with pytest.raises(weights.FileFormatError, match=match):
        weights.read_adapter(path)


def test_what_diffusers_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    layer = weights.LayerWeights("loha", {"rank": 1, "alpha": 1.0}, {})
    lora = weights.LayerWeights(
        "lora", {"rank": 1, "alpha": 1.0}, {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(4, 1)}
    )
    for file, match in (
        (weights.AdapterFile({"unet.fc": layer}, components=("unet",)), "'loha', which is none of lora and dora"),
        (weights.AdapterFile({"clip.fc": lora}, components=("clip",)), "the component 'clip', of no pipeline"),
        (weights.AdapterFile({"unet.fc_0": lora}, components=("unet",), flattened=True), "are flattened"),
        (weights.AdapterFile({}), "no layers with an adapter"),
    ):
        with pytest.raises(weights.FileFormatError, match=match):
            weights.write_adapter(file, tmp_path / "out", format="diffusers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [2, 3])
def test_a_file_of_kohyas_kind_goes_into_both_models_here_and_there(tmp_path: Path, rank: int) -> None:
    """With the names that files have for CLIP, which is called otherwise in transformers now."""
    ours, theirs, again = pipeline(), pipeline(), pipeline()
    targets = ["unet.**.attn*.to_*", "text_encoder.**.self_attn.*_proj"]
    patch = adapters.inject(ours.pipe, LoRA(rank=rank, alpha=3), targets, exclude=["unet.**.to_out.*"])
    perturb(patch)
    path = patch.save_pretrained(tmp_path / "style.safetensors", format="lycoris")
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in weights.open(path)
    theirs.pipe.load_lora_weights(str(path))
    assert_close(theirs(), ours())
    adapters.load(again.pipe, path)
    assert all(map(torch.equal, again(), ours()))


# As kohya's scripts name the layers of Stable Diffusion XL, and diffusers does.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_LAYER_1, _LAYER_0 = "text_encoder.encoder.layers.1.self_attn", "text_encoder_2.text_model.encoder.layers.0.self_attn"
_DOWN, _MIDDLE, _UP = "unet.down_blocks", "unet.mid_block.attentions.0", "unet.up_blocks.1.attentions.0"
XL = {
    "lora_unet_input_blocks_4_1_proj_in": f"{_DOWN}.1.attentions.0.proj_in",
    "lora_unet_input_blocks_5_1_transformer_blocks_1_ff_net_2": f"{_DOWN}.1.attentions.1.transformer_blocks.1.ff.net.2",
    "lora_unet_input_blocks_8_1_transformer_blocks_2_ff_net_2": f"{_DOWN}.2.attentions.1.transformer_blocks.2.ff.net.2",
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": f"{_MIDDLE}.transformer_blocks.0.ff.net.0.proj",
    "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_k": f"{_UP}.transformer_blocks.0.attn1.to_k",
    **{f"lora_te1_text_model_encoder_layers_1_self_attn_{name}": f"{_LAYER_1}.{name}" for name in _ATTENTION},
    **{f"lora_te2_text_model_encoder_layers_0_self_attn_{name}": f"{_LAYER_0}.{name}" for name in _ATTENTION},
}


def test_a_file_with_the_names_of_the_original_goes_into_three_models(tmp_path: Path) -> None:
    ours, theirs = pipeline_xl(), pipeline_xl()
    before = ours()
    torch.default_generator.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for stem, path in XL.items():
        component, _, inside = path.partition(".")
        outputs, inputs = getattr(ours.pipe, component).get_submodule(inside).weight.shape
        tensors |= {f"{stem}.lora_down.weight": torch.randn(2, inputs) / 2, f"{stem}.alpha": torch.tensor(1.0)}
        tensors[f"{stem}.lora_up.weight"] = torch.randn(outputs, 2) / 2
    path = weights.save(tensors, tmp_path / "xl.safetensors")
    patch = adapters.load(ours.pipe, path)
    assert set(patch.targets) == set(XL.values())
    theirs.pipe.load_lora_weights(str(path))
    assert_close(ours(), theirs())
    assert not any(torch.allclose(now, then, atol=1e-3) for now, then in zip(ours(), before, strict=True))
