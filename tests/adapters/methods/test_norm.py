"""`NormTuning` replaces the weights and the biases of normalisations, torch's and others."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import normalization
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import adapters
from adapters import NormTuning, TargetError
from tests.adapters.models import snapshot


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), weight, bias)


LAYERS = {
    "layer": (lambda: nn.LayerNorm(4), lambda x, w, b: F.layer_norm(x, (4,), w, b)),
    "group": (lambda: nn.GroupNorm(2, 4), lambda x, w, b: F.group_norm(x, 2, w, b)),
    "batch": (lambda: nn.BatchNorm1d(4), batch_norm),
    "rms": (lambda: nn.RMSNorm(4), lambda x, w, b: F.rms_norm(x, (4,), w)),
}


@given(st.sampled_from(sorted(LAYERS)), st.floats(-2, 2))
def test_closed_form(name: str, scale: float) -> None:
    make, compute = LAYERS[name]
    model, x = nn.Sequential(make()).double().eval(), torch.randn(3, 4).double()
    base = model(x)
    own = {"0": model[0].weight, "0.bias": getattr(model[0], "bias", None)}
    patch = adapters.inject(model, NormTuning(), scale=scale)
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    state = {name: torch.randn_like(value) for name, value in patch.state_dict().items()}
    patch.load_state_dict(state)
    weight, bias = (
        None if value is None else value + scale * (state[f"{path}.copy"] - value) for path, value in own.items()
    )
    torch.testing.assert_close(model(x), compute(x, weight, bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        LlamaRMSNorm(4),
        GemmaRMSNorm(4),
        T5LayerNorm(4),
        normalization.RMSNorm(4, eps=1e-6),
        normalization.FP32LayerNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_normalisations_of_others(layer: nn.Module) -> None:
    model = nn.ModuleDict({"norm": layer, "other": nn.Linear(2, 2)})
    patch = adapters.inject(model, NormTuning())
    assert [place.path for place in patch.attachments] == ["norm", "norm.bias"][: 1 + ("bias" in layer._parameters)]


def test_a_norm_without_parameters_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4))
    with pytest.raises(TargetError, match="0 is a LayerNorm, which NormTuning cannot adapt"):
        adapters.inject(model, NormTuning(), "0")
    assert list(adapters.inject(model, NormTuning()).targets) == ["1", "1.bias"]


def test_statistics_stay_those_of_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    patch = adapters.inject(model, NormTuning())
    model.train()
    before = model[0].base.running_mean.clone()
    model(torch.randn(5, 4) + 3)
    assert not torch.equal(model[0].base.running_mean, before)  # As torch does it, with adapters or without.
    patch.eject()
    assert isinstance(model[0], nn.BatchNorm1d) and snapshot(model)
