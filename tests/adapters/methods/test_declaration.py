"""Unknown hyperparameters, and methods that were written for earlier releases."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters import AdapterError, DoRA, HyperparameterError, LoRA, Method
from adapters.methods.core.formulas import InputMap, OutputMap

HINTS: list[tuple[type[Method], dict[str, Any], str]] = [
    (LoRA, {"r": 8}, "LoRA has no r=: its name here is rank=, as in LoRA(rank=8)."),
    (DoRA, {"r": 8}, "DoRA has no r=: its name here is rank=, as in DoRA(rank=8)."),
    (LoRA, {"lora_alpha": 16}, "LoRA has no lora_alpha=: its name here is alpha=, as in LoRA(alpha=16)."),
    (LoRA, {"lora_dropout": 0.1}, "LoRA has no lora_dropout=: its name here is dropout=, as in LoRA(dropout=0.1)."),
    (LoRA, {"init_lora_weights": "pissa"}, 'its name here is init=, as in LoRA(init="pissa").'),
    (
        LoRA,
        {"target_modules": ["q_proj"]},
        "LoRA has no target_modules=: layers are named at injection, as in"
        " adapters.inject(model, LoRA(), targets=...).",
    ),
    (LoRA, {"exclude_modules": "head"}, "adapters.inject(model, LoRA(), exclude=...)."),
    (LoRA, {"use_dora": True}, "DoRA is a method of its own, as in adapters.DoRA(rank=8)."),
    (LoRA, {"rnak": 8}, "LoRA has no rnak=: did you mean rank=?"),
    (adapters.OFT, {"oft_block_size": 32}, "its name here is block_size=, as in OFT(block_size=32)."),
    (adapters.IA3, {"r": 8}, "IA3 has no r=: it has feedforward=, bias=."),
    (adapters.BitFit, {"r": 8}, "BitFit has no r=: it has no hyperparameters."),
]


@pytest.mark.parametrize(("method", "given", "message"), HINTS)
def test_a_hint_for_a_hyperparameter_that_there_is_not(
    method: type[Method], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(HyperparameterError) as caught:
        method(**given)
    assert str(caught.value).endswith(message)
    assert isinstance(caught.value, AdapterError) and isinstance(caught.value, TypeError)


@pytest.mark.parametrize("method", adapters.METHODS.values(), ids=lambda method: method.__name__)
def test_every_method_refuses_what_it_does_not_know(method: type[Method]) -> None:
    with pytest.raises(AdapterError, match=f"{method.__name__} has no surely_unknown=: "):
        method(surely_unknown=1)


def test_every_example_of_a_hint_works() -> None:
    for method, _, message in HINTS:
        call = message.rpartition("as in ")[2].removesuffix(".")
        if call.startswith((f"{method.__name__}(", "adapters.DoRA")):
            made = eval(call, {"adapters": adapters, method.__name__: method})
            assert isinstance(made, Method)


def test_a_method_is_made_and_copied_as_other_dataclasses_are() -> None:
    method = DoRA(4, alpha=2)
    assert replace(method, rank=2) == DoRA(2, alpha=2)
    assert list(inspect.signature(LoRA).parameters) == ["rank", "alpha", "dropout", "rslora", "bias", "init"]
    for twin in (copy.copy(method), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert twin == method and hash(twin) == hash(method)
    with pytest.raises(TypeError, match="positional"):
        LoRA(1, 2, 3, 4, 5, 6, 7)  # type: ignore[call-arg]


def test_a_class_with_an_initializer_of_its_own() -> None:
    class Own(LoRA):
        def __init__(self, r: int) -> None:
            super().__init__(rank=r)

    class Any_(LoRA):
        def __init__(self, **given: int) -> None:
            super().__init__(rank=given["whatever"])

    assert Own(r=3).rank == 3
    assert Any_(whatever=5).rank == 5
    with pytest.raises(HyperparameterError, match="Own has no lora_alpha="):
        Own(lora_alpha=3)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Earlier(Method):
    """A method with the hooks' names of an earlier release: outputs and the bias are doubled, beside the layer."""

    key = "earlier"

    def check_site(self, site: adapters.Site) -> None:  # type: ignore[name-defined]
        if site.shape[0] == 3:
            raise adapters.TargetError(f"{site.path} has three outputs.")

    def tensors(self, site: adapters.Site) -> dict[str, Tensor]:  # type: ignore[name-defined]
        return {"factor": site.ones(1)}

    def names(self, site: adapters.Site) -> tuple[str, ...]:  # type: ignore[name-defined]
        return (site.parameter, "bias")

    def update(self, weight: Tensor, t: adapters.Tensors) -> Tensor:
        return weight * t.factor

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: adapters.Tensors) -> Tensor | None:
        return None if bias is None else bias * t.factor

    def beside(self, layer: nn.Module, matrix: Any) -> bool:
        return True

    def run(self, branch: Any, layer: Callable[..., Any], scale: Any, x: Tensor) -> Tensor:
        return layer(x) * (1 + scale * (branch.factor - 1))


def test_hooks_under_the_names_of_earlier_releases() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(2, 4)
    with pytest.raises(adapters.TargetError, match="three outputs"):
        adapters.inject(model, Earlier())
    base = model(x)
    patch = adapters.inject(model, Earlier(), targets="0")
    assert patch.attachments[0].branch.bypass
    nn.init.constant_(patch.attachments[0].branch.factor, 2.0)
    doubled = model[1](2 * model[0].base(x))
    torch.testing.assert_close(model(x), doubled)
    patch.merge()
    torch.testing.assert_close(model(x), doubled)
    patch.eject()
    assert torch.equal(model(x), base)


def test_formulas_under_the_names_of_earlier_releases() -> None:
    assert issubclass(adapters.RoAd, OutputMap) and issubclass(adapters.HRA, InputMap)
