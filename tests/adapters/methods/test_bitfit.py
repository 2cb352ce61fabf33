"""`BitFit` changes biases, and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adapters
from adapters import BitFit
from tests.adapters.methods.closed_form import few


@few
@given(st.integers(1, 5), st.integers(2, 5), st.floats(-2, 2))
def test_closed_form(inputs: int, outputs: int, scale: float) -> None:
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Linear(outputs, 2, bias=False)).double()
    x = torch.randn(3, inputs, dtype=torch.float64)
    base = model(x)
    patch = adapters.inject(model, BitFit(), scale=scale)
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    state = {name: torch.randn_like(value) for name, value in patch.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == {
        "0.bias.copy": (outputs,),
        "1.bias.copy": (outputs,),
    }
    patch.load_state_dict(state)
    first, norm = (
        own + scale * (state[f"{path}.bias.copy"] - own)
        for path, own in (("0", model[0].base.bias), ("1", model[1].base.bias))
    )
    hidden = F.layer_norm(F.linear(x, model[0].base.weight, first), (outputs,), model[1].base.weight, norm)
    torch.testing.assert_close(model(x), F.linear(hidden, model[2].weight), rtol=1e-10, atol=1e-10)


def test_attention_has_its_biases_trained() -> None:
    model, x = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}), torch.randn(3, 1, 4)
    patch = adapters.inject(model, BitFit())
    assert sorted(patch.targets) == ["attn.in_proj_bias", "attn.out_proj.bias"]
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    found = model["attn"](x, x, x)[0]
    state = patch.state_dict()
    patch.eject()
    model["attn"].in_proj_bias = nn.Parameter(state["attn.in_proj_bias.copy"])
    model["attn"].out_proj.bias = nn.Parameter(state["attn.out_proj.bias.copy"])
    torch.testing.assert_close(found, model["attn"](x, x, x)[0])


def test_a_file_holds_copies(tmp_path: Path) -> None:
    model, x = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}), torch.randn(3, 1, 4)
    patch = adapters.inject(model, BitFit())
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    expected = model["attn"](x, x, x)[0]
    patch.save_pretrained(tmp_path)
    patch.eject()
    loaded = adapters.load(model, tmp_path)
    assert {str(place.branch.method) for place in loaded.attachments} == {"Copy()"}
    torch.testing.assert_close(model["attn"](x, x, x)[0], expected)
