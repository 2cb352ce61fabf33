"""`Copy` is the module with other parameters; its buffers are those of the model, also in files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adapters
from adapters import Copy, LayerMismatchError
from tests.adapters.methods.closed_form import few


@few
@given(st.integers(1, 4), st.integers(1, 4), st.floats(-2, 2))
def test_closed_form(inputs: int, outputs: int, scale: float) -> None:
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(inputs, 3), nn.Tanh(), nn.Linear(3, outputs))}).double()
    head, x = model["head"], torch.randn(2, inputs).double()
    base = head(x)
    own = dict(head.named_parameters())
    patch = adapters.inject(model, Copy(), "head", scale=scale)
    torch.testing.assert_close(head(x), base, rtol=1e-12, atol=1e-12)
    state = {name: torch.randn_like(value) for name, value in patch.state_dict().items()}
    patch.load_state_dict(state)
    keys = {"0.weight": "0", "0.bias": "0.bias", "2.weight": "2", "2.bias": "2.bias"}
    w0, b0, w2, b2 = (own[name] + scale * (state[f"head.{key}.copy"] - own[name]) for name, key in keys.items())
    torch.testing.assert_close(head(x), F.linear(F.linear(x, w0, b0).tanh(), w2, b2), rtol=1e-10, atol=1e-10)


def test_a_parameter_of_a_module_of_modules_is_saved(tmp_path: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.gain

    model, x = nn.Sequential(nn.Linear(3, 3), Head()), torch.randn(2, 3)
    base = copy.deepcopy(model)
    patch = adapters.inject(model, Copy(), "1")
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    patch.save_pretrained(tmp_path)
    expected = model(x)
    adapters.load(base, tmp_path)
    torch.testing.assert_close(base(x), expected)


def test_a_file_with_other_statistics_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    adapters.inject(model, Copy(), "1").save_pretrained(tmp_path)
    adapters.patches(model)["default"].eject()
    adapters.load(model, tmp_path, name="same").eject()
    model.train()(torch.randn(4, 3))
    for strict in (True, False):
        with pytest.raises(
            LayerMismatchError, match="1: running_mean is not that of the model, and a patch changes par"
        ):
            adapters.load(model, tmp_path, strict=strict)
