"""What is written here, as the servers of others load it: `load_adapter` of transformers, and the rules of vLLM."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import adapters
from adapters import DoRA, LoRA
from tests.adapters.models import Case, perturb
from tests.adapters.pretrained import build


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


METHODS = [LoRA(rank=4, alpha=8), LoRA(rank=3, alpha=2, rslora=True)]


# It does not find the magnitudes of DoRA, in files of PEFT neither.
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("name", "targets"), [("bert", ["query", "value"]), ("llama", ["q_proj", "down_proj"])])
def test_transformers_loads_it(tmp_path: Path, name: str, targets: list[str], method: adapters.Method) -> None:
    case = build(name)
    theirs = copy.deepcopy(case.model)
    patch = adapters.inject(case.model, method, targets, name="style")
    perturb(patch)
    folder = patch.save_pretrained(tmp_path)
    theirs.load_adapter(str(folder), adapter_name="style")
    close(case(), case.run(theirs.eval(), case.inputs))
    theirs.disable_adapters()
    with adapters.use(case.model):
        close(case(), case.run(theirs, case.inputs))


def test_transformers_has_several_of_them(tmp_path: Path) -> None:
    case = build("llama")
    theirs = copy.deepcopy(case.model)
    for number, (name, targets) in enumerate([("style", ["q_proj"]), ("pose", ["v_proj", "o_proj"])]):
        patch = adapters.inject(case.model, LoRA(rank=2 + number), targets, name=name)
        perturb(patch, seed=number)
        theirs.load_adapter(str(patch.save_pretrained(tmp_path / name)), adapter_name=name)
    for name in ("style", "pose"):
        theirs.set_adapter(name)
        with adapters.use(case.model, name):
            close(case(), case.run(theirs.eval(), case.inputs))


# vLLM cannot be installed everywhere. What it does with a folder is written in its vllm/lora: peft_helper.py,
# utils.py, lora_model.py and layers.

_ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}


def served_by_vllm(folder: Path, *, supported: set[str], max_rank: int = 16) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The factors and the scale of each layer, as vLLM takes them from a folder.

    Args:
        folder: What is served.
        supported: The last names of the layers that may have adapters.
        max_rank: Its `max_lora_rank`, 16 unless told otherwise.

    Raises:
        ValueError: vLLM would not load the folder, or would compute something else than PEFT.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    rank, alpha = settings["r"], settings["lora_alpha"]
    if not settings["target_modules"] or settings.get("modules_to_save") or settings.get("use_dora"):
        raise ValueError("It takes nothing but plain LoRA.")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        raise ValueError("It takes no biases.")
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise ValueError("It takes one rank and one alpha, for all layers.")
    if rank > max_rank:
        raise ValueError(f"A rank of {rank} is more than {max_rank}.")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    halves: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            end = next((end for end in _ENDS if key.endswith(end)), None)
            if end is None:
                raise ValueError(f"The key {key} is none of LoRA.")
            path = key.removesuffix(end).removeprefix("base_model.model.")
            if path.rpartition(".")[2] not in supported:
                raise ValueError(f"The layer {path} may not have an adapter.")
            halves.setdefault(path, {})[_ENDS[end]] = file.get_tensor(key)
    return {path: (both["A"], both["B"], scale) for path, both in halves.items()}


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@torch.no_grad()
def computed(case: Case, loras: dict[str, tuple[Tensor, Tensor, float]]) -> Tensor:
    model = copy.deepcopy(case.model)
    for path, (down, up, scale) in loras.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        layer.weight += scale * up @ down
    return case.run(model, case.inputs)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], sorted(LINEAR)], ids=["two", "all"])
def test_vllm_finds_what_it_expects(tmp_path: Path, method: adapters.Method, targets: list[str]) -> None:
    case = build("llama")
    base = copy.copy(case)
    base.model = copy.deepcopy(case.model)
    patch = adapters.inject(case.model, method, targets)
    perturb(patch)
    loras = served_by_vllm(patch.save_pretrained(tmp_path), supported=LINEAR)
    assert loras.keys() == {*patch.targets}
    close(case(), computed(base, loras))


def test_vllm_is_not_given_more_than_it_can(tmp_path: Path) -> None:
    """What PEFT can and vLLM cannot is in the settings or the keys, where it is found; nothing else is there."""
    case = build("llama")
    for number, (method, reason) in enumerate(
        [
            (DoRA(rank=2), "nothing but plain LoRA"),
            (LoRA(rank=17), "more than 16"),
            ({"q_proj": LoRA(rank=2), "v_proj": LoRA(rank=4)}, "one rank"),
        ]
    ):
        targets = {} if isinstance(method, dict) else {"targets": ["q_proj"]}
        patch = adapters.inject(case.model, method, **targets)
        folder = patch.save_pretrained(tmp_path / str(number))
        patch.eject()
        with pytest.raises(ValueError, match=reason):
            served_by_vllm(folder, supported=LINEAR)
