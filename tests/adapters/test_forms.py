"""The forms in mixed precision, under autocast, in checkpointed training and on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapters
from adapters import C3A, HRA, IA3, DeLoRA, GraLoRA, LoKr, LoRA, Method, MiSS, Patch, RoAd, VeRA
from adapters.methods.core.formulas import InputTransform, LowRank, MatrixFree, OutputTransform
from tests.adapters.models import perturb

METHODS: dict[str, Method] = {
    "output, ia3": IA3(),
    "output, road": RoAd("road_4", group_size=4),
    "input, ia3": IA3(feedforward=True),
    "input, hra": HRA(rank=4),
    "matrix-free, c3a": C3A(block_size=4),
    "matrix-free, lokr": LoKr(rank=1),
    "low rank": DeLoRA(rank=3, boundary=2),
    "low rank, gralora": GraLoRA(rank=8, blocks=4, hybrid_rank=2),
    "low rank, miss": MiSS(rank=3, mini_r=4),
    "low rank, vera": VeRA(rank=8, d_initial=1),
    "layers": LoRA(rank=3),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 24), (4, 3, 16)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6)),
}
ROUNDING = 2.0**-8
"""Of a number to bfloat16, relative."""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[request.param]
    return nn.Sequential(make()), torch.randn(shape)


def exact(patch: Patch, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of the sum of its squares, by the weights and in double precision."""
    (place,) = patch.attachments
    branch = copy.deepcopy(place.branch).double()
    layer = copy.deepcopy(place.target).double()
    own = {name: getattr(layer, name).detach() for name in branch.names}
    output = torch.func.functional_call(layer, branch.change(own, 1.0), (x.double(),))
    parameters = [parameter for _, parameter in branch.named_weights()]
    return output, list(torch.autograd.grad(output.square().sum(), parameters))


def near(found: Tensor, expected: Tensor, roundings: float) -> None:
    """Whether the error, as a whole, is what so many roundings make of each number."""
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= roundings * ROUNDING, f"{error / ROUNDING:.2f} roundings"


def test_the_methods_have_these_forms() -> None:
    assert isinstance(METHODS["output, road"], OutputTransform)
    assert isinstance(METHODS["input, hra"], InputTransform)
    assert isinstance(METHODS["low rank"], LowRank)
    assert isinstance(METHODS["matrix-free, c3a"], MatrixFree)


@pytest.mark.parametrize("rows", [(), (5,), (0,), (2, 3)])
@pytest.mark.parametrize("method", [C3A(3), *(m for m in METHODS.values() if isinstance(m, MatrixFree))], ids=str)
def test_products_are_those_of_the_update(method: MatrixFree, rows: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(12, 24)).double()
    patch = adapters.inject(model, method)
    perturb(patch)
    tensors, x = patch.attachments[0].branch.values(), torch.randn(*rows, 12, dtype=torch.float64)
    torch.testing.assert_close(method.product(x, tensors), x @ method.delta(tensors).T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(method: Method, case: tuple[nn.Module, Tensor], dtype: torch.dtype) -> None:
    """Forward and backward are the exact ones to rounding, whichever precision the adapter is in."""
    model, x = case
    patch = adapters.inject(model, method, dtype=dtype)
    perturb(patch, std=0.5)
    output, gradients = exact(patch, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    near(found, output, 2)
    found.float().square().sum().backward()
    for parameter, gradient in zip(patch.parameters(), gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == dtype
        near(parameter.grad, gradient, 6)


def test_single_precision_on_a_base_of_less(method: Method, case: tuple[nn.Module, Tensor]) -> None:
    model, x = case[0].to(torch.bfloat16), case[1].to(torch.bfloat16)
    patch = adapters.inject(model, method, dtype=torch.float32)
    perturb(patch, std=0.5)
    assert all(parameter.dtype == torch.float32 for parameter in patch.parameters())
    output, gradients = exact(patch, x)
    found = model(x)
    assert found.dtype == torch.bfloat16
    near(found, output, 2)
    found.float().square().sum().backward()
    for parameter, gradient in zip(patch.parameters(), gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        near(parameter.grad, gradient, 6)


def test_an_adapter_of_less_precision_does_not_round_the_base(method: Method, case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    base = model(x)
    patch = adapters.inject(model, method, dtype=torch.bfloat16)
    found = model(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, base, rtol=1e-6, atol=1e-6)
    assert all(parameter.dtype == torch.bfloat16 for parameter in patch.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_training(method: Method, case: tuple[nn.Module, Tensor], reentrant: bool, autocast: bool) -> None:
    """What is computed again in the backward is what was computed before."""
    model, x = case
    x.requires_grad_()
    patch = adapters.inject(model, method)
    perturb(patch, std=0.5)
    gradients: list[list[Tensor | None]] = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(x).float().square().sum()
        loss.backward()
        gradients.append([tensor.grad for tensor in (x, *patch.parameters())])
        for tensor in (x, *patch.parameters()):
            tensor.grad = None
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_file_is_kept_for_weights_that_come_later(
    method: Method, case: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    model, x = case
    patch = adapters.inject(model, method)
    perturb(patch)
    expected = model(x)
    path = patch.save_pretrained(tmp_path / "file.safetensors", format="fluxion")
    patch.eject()
    state = model.state_dict()
    empty = copy.deepcopy(model).to("meta")
    if isinstance(method, DeLoRA):  # Which keeps the lengths that the weight has.
        with pytest.raises(adapters.AdapterError, match="meta tensor"):
            adapters.load(empty, path)
        return
    loaded = adapters.load(empty, path)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    empty.load_state_dict(state, assign=True, strict=False)
    assert torch.equal(empty(x), expected)


def test_meta_device(method: Method, case: tuple[nn.Module, Tensor]) -> None:
    """An adapter can be made before there are weights, and be given its values with them."""
    model, x = case
    patch = adapters.inject(model, method)
    perturb(patch)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    patch.eject()
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
        made = adapters.inject(empty, method)
        assert empty(x.to("meta")).shape == expected.shape
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    empty.load_state_dict(state, assign=True)
    torch.testing.assert_close(empty(x), expected)


def test_a_bias_that_another_patch_adds_is_mapped_too() -> None:
    """A layer without a bias gets one of LoRA: what maps outputs maps it, beside the layer and merged."""
    model, x = nn.Sequential(nn.Linear(4, 6, bias=False)).double(), torch.randn(3, 4, dtype=torch.float64)
    lora = adapters.inject(model, adapters.LoRA(rank=2, bias=True), name="lora")
    gate = adapters.inject(model, adapters.IA3(), name="gate")
    with torch.no_grad():
        for parameter in (*lora.parameters(), *gate.parameters()):
            parameter.add_(torch.randn_like(parameter))
        expected = model(x)
        for order in ([lora, gate], [gate, lora]):
            for patch in order:
                patch.merge()
                torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
            assert model[0].base.bias is not None
            for patch in order:
                patch.unmerge()
            assert model[0].base.bias is None and torch.equal(model(x), expected)
