"""The short way of a node: equal to the long way, wherever it is gone, and left for whatever a user has changed."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import adapters
import fluxion as fl
from adapters import LoRA
from adapters.methods.core.method import Branch
from adapters.runtime.adapted_layer import AdaptedLayer
from tests.adapters.models import perturb
from tests.thinned import examples

INPUTS, OUTPUTS = 6, 5


def adapted(
    *methods: LoRA, dtype: torch.dtype = torch.float32, bias: bool = True, kind: type[nn.Linear] = nn.Linear, **kw: Any
) -> AdaptedLayer:
    """A node with a patch for each of these methods, which are named a, b, c and so on."""
    model = nn.Sequential(kind(kw.pop("inputs", INPUTS), kw.pop("outputs", OUTPUTS), bias=bias, dtype=dtype))
    for number, method in enumerate(methods or (LoRA(rank=2, alpha=3),)):
        perturb(adapters.inject(model, method, targets=["0"], name="abcdefgh"[number], **kw), seed=number)
    node = model[0]
    assert isinstance(node, AdaptedLayer)
    node.__dict__["model"] = model  # Past torch, which would take it for a child.
    return node


def is_short(node: AdaptedLayer, x: Tensor) -> bool:
    """Whether a call goes the short way, in which no other module is called."""
    called = []

    def seen(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == "forward" and (other := frame.f_locals.get("self")) is not node:
            called.append(isinstance(other, nn.Module))

    sys.setprofile(seen)
    try:
        with torch.random.fork_rng(devices=()):
            node(x)
    finally:
        sys.setprofile(None)
    return not any(called)


def long_way(node: AdaptedLayer, x: Tensor) -> Tensor:
    """Output of the long way, which a hook below the node makes every call go."""
    handle = node.base.register_forward_hook(lambda *_: None)
    try:
        return node(x)
    finally:
        handle.remove()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected)


def branch_of(node: AdaptedLayer) -> Any:
    return node.branches[0]


# The same output


def reference(node: AdaptedLayer, x: Tensor) -> Tensor:
    """By plain torch, from the tensors alone."""
    output = nn.functional.linear(x, node.base.weight, node.base.bias)
    for branch in node.branches:
        a, b = (branch.tensors()[name].to(x.dtype) for name in ("lora_A", "lora_B"))
        output = output + branch.switch.scale * branch.method.scaling * (x @ a.T @ b.T)
    return output


@examples(25, 60)
@given(
    methods=st.lists(
        st.builds(LoRA, rank=st.integers(1, 4), alpha=st.sampled_from([None, 0.5, 3]), rslora=st.booleans()),
        min_size=1,
        max_size=4,
    ),
    scales=st.lists(st.sampled_from([1.0, 0.5, -2.0]), min_size=4, max_size=4),
    bias=st.booleans(),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    tokens=st.sampled_from([1, 64]),
    swapped=st.booleans(),
    grad=st.booleans(),
)
def test_it_equals_plain_torch(
    methods: list[LoRA],
    scales: list[float],
    bias: bool,
    shape: list[int],
    tokens: int,
    swapped: bool,
    grad: bool,
) -> None:
    """For any number of patches, shape, layout and mode."""
    node = adapted(*methods, dtype=torch.float64, bias=bias)
    for branch, scale in zip(node.branches, scales, strict=False):
        branch.switch.scale = scale
    x = torch.randn(*shape, tokens, INPUTS, dtype=torch.float64)
    if swapped:
        x = torch.randn(*shape[:-1], tokens, INPUTS, shape[-1], dtype=torch.float64).movedim(-1, -3)
    with torch.set_grad_enabled(grad):
        assert is_short(node, x)
        close(node(x), reference(node, x))
        close(node(x), long_way(node, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
def test_adapters_in_another_dtype(base: torch.dtype, own: torch.dtype, mode: Any) -> None:
    node = adapted(LoRA(rank=2), LoRA(rank=3), dtype=base, inputs=32)
    for branch in node.branches:
        branch.to(own)
    x = torch.randn(3, 32, dtype=base)
    with mode():
        assert is_short(node, x)
        found = node(x)
        assert found.dtype is base
        wide = copy.deepcopy(node).double()
        torch.testing.assert_close(found.double(), long_way(wide, x.double()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 200])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_a_patch_of_zeros_changes_no_bit(dtype: torch.dtype, tokens: int, grad: bool, turned: bool) -> None:
    node = adapted(LoRA(rank=2), LoRA(rank=3, alpha=1), dtype=dtype, inputs=48, outputs=40)
    for branch in node.branches:
        nn.init.zeros_(branch.lora_B.weight)  # type: ignore[union-attr, arg-type]
    x = torch.randn(2, tokens, 48, dtype=dtype)
    if turned:
        x = torch.randn(2, 48, tokens, dtype=dtype).transpose(1, 2)
    with torch.set_grad_enabled(grad):
        assert is_short(node, x)
        assert torch.equal(node(x), node.base(x))


def test_no_outputs_and_no_tokens() -> None:
    node = adapted(outputs=0)
    assert node(torch.randn(4, INPUTS)).shape == (4, 0)
    node = adapted()
    x = torch.randn(0, 3, INPUTS, requires_grad=True)
    node(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert torch.equal(branch_of(node).lora_A.weight.grad, torch.zeros(2, INPUTS))


def test_what_is_given_stays_as_it_is() -> None:
    node = adapted()
    x = torch.randn(3, 4, INPUTS)
    before, weights = x.clone(), copy.deepcopy(node.state_dict())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            node(x)
    assert torch.equal(x, before)
    assert all(torch.equal(value, weights[name]) for name, value in node.state_dict().items())


# Gradients


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_and_gradients_of_gradients(dropout: float, count: int) -> None:
    methods = [LoRA(rank=2, alpha=3, dropout=dropout), LoRA(rank=1)][:count]
    if dropout and count == 2:
        methods[1] = LoRA(rank=1, dropout=dropout)  # Dropping inputs of its own: the long way.
    node = adapted(*methods, dtype=torch.float64, freeze_base=False)
    node.train()
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    assert is_short(node, x) is not (dropout > 0 and count == 2)
    values = list(node.parameters())

    def run(*tensors: Tensor) -> Tensor:
        torch.default_generator.manual_seed(0)
        return node(tensors[0])

    assert len(values) == 2 + 2 * count
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("only", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_gradients_of_one_alone(only: str) -> None:
    node = adapted(freeze_base=False)
    x = torch.randn(2, 3, INPUTS)
    named = {"x": x, **dict(node.base.named_parameters()), **branch_of(node).tensors()}
    for name, tensor in named.items():
        tensor.requires_grad_(name == only)
    assert is_short(node, x)
    (found,) = torch.autograd.grad(node(x).square().sum(), named[only])
    (expected,) = torch.autograd.grad(long_way(node, x).square().sum(), named[only])
    close(found, expected)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_gradients_are_in_the_dtype_of_the_adapter(own: torch.dtype) -> None:
    node = adapted(dtype=torch.bfloat16)
    branch_of(node).to(own)
    node(torch.randn(3, INPUTS, dtype=torch.bfloat16)).sum().backward()
    assert {parameter.grad.dtype for parameter in branch_of(node).parameters()} == {own}


def test_complex_layers_have_right_gradients() -> None:
    node = adapted(dtype=torch.float64)
    for parameter in node.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.complex128)
    x = torch.randn(2, INPUTS, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(node, (x,))


def test_dropped_inputs_are_those_of_torch_in_number_and_size() -> None:
    node = adapted(LoRA(rank=1, dropout=0.25), inputs=10_000, outputs=1)
    nn.init.ones_(branch_of(node).lora_A.weight)
    nn.init.ones_(branch_of(node).lora_B.weight)
    nn.init.zeros_(node.base.weight)  # type: ignore[arg-type]
    nn.init.zeros_(node.base.bias)  # type: ignore[arg-type]
    x = torch.ones(1, 10_000, requires_grad=True)
    for _ in range(2):
        (grad,) = torch.autograd.grad(node(x).sum(), x)
        assert set(grad.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((grad == 0).float().mean().item() - 0.25) < 0.03
    with torch.no_grad():
        first, second = node(x), node(x)
    assert not torch.equal(first, second)
    node.eval()
    close(node(x), torch.full((1, 1), 10_000.0))


def test_all_inputs_dropped() -> None:
    node = adapted(LoRA(rank=2, dropout=0.5))
    branch_of(node).Dropout.p = 1.0
    x = torch.randn(3, INPUTS)
    close(node(x), node.base(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing(reentrant: bool, dropout: float) -> None:
    node = adapted(LoRA(rank=2, dropout=dropout), inputs=32)
    x = torch.randn(4, 32, requires_grad=True)

    def gradients(run: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.default_generator.manual_seed(1)
        return list(torch.autograd.grad(run(x).square().sum(), list(branch_of(node).parameters())))

    def backward(run: Callable[[Tensor], Any]) -> list[Tensor]:
        torch.default_generator.manual_seed(1)
        node.zero_grad()
        run(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in branch_of(node).parameters()]

    expected = gradients(node)
    found = backward(lambda x: checkpoint(node, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_gradients_is_of_the_size_of_the_rank(dropout: float, own: torch.dtype) -> None:
    node = adapted(LoRA(rank=2, alpha=3, dropout=dropout), dtype=torch.bfloat16, inputs=64, outputs=64)
    branch_of(node).to(own)
    x = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    known = {tensor.data_ptr() for tensor in (x, *node.parameters())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        node(x)
    beyond = sum(size for pointer, size in kept.items() if pointer not in known)
    assert 0 < beyond <= (100 + 2 * 64) * 2 * 2


def test_kept_tensors_may_change_their_layout() -> None:
    """The mask is made again for what torch hands back, which may have other strides."""
    node = adapted(LoRA(rank=2, dropout=0.5), inputs=64)
    x = torch.randn(50, 64).t().contiguous().t().requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        torch.default_generator.manual_seed(0)
        return torch.autograd.grad(node(x).square().sum(), (x, *branch_of(node).parameters()))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        found = gradients()
    for a, b in zip(found, expected, strict=True):
        close(a, b)


# Whatever is changed is noticed


def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1


def pre_shift(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


def seen_by(node: AdaptedLayer, part: str) -> nn.Module:
    parts = {"node": node, "base": node.base, "branch": branch_of(node)}
    return parts[part] if part in parts else branch_of(node)._modules[part]


PARTS = ["node", "base", "branch", "lora_A", "Multiply", "lora_B"]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["hook", "pre_hook", "kwargs", "always", "forward", "table"])
def test_hooks_and_patched_forwards(kind: str, part: str, called: bool) -> None:
    node, x = adapted(), torch.randn(3, INPUTS)
    untouched = node(x) if called else copy.deepcopy(node)(x)
    module = seen_by(node, part)
    for _ in range(2):
        calls: list[nn.Module] = []

        def count(module: nn.Module, args: Any, *others: Any, calls: list[nn.Module] = calls) -> Any:
            calls.append(module)
            output = others[-1] if others else args
            return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

        if kind == "hook":
            undo = module.register_forward_hook(count).remove
        elif kind == "pre_hook":
            undo = module.register_forward_pre_hook(count).remove
        elif kind == "kwargs":
            undo = module.register_forward_hook(count, with_kwargs=True).remove
        elif kind == "always":
            undo = module.register_forward_hook(count, always_call=True).remove
        elif kind == "table":  # As code that clears all hooks of a model does it.
            module._forward_hooks = OrderedDict()
            assert torch.equal(node(x), untouched)
            undo = module.register_forward_hook(count).remove
        else:
            before = module.forward
            module.forward = lambda *args: (calls.append(module), before(*args) + 1)[1]  # type: ignore[method-assign] # noqa: B023

            def undo() -> None:
                del module.forward

        changed = node(x)
        assert calls == [module]
        assert not torch.allclose(changed, untouched)
        undo()
        calls.clear()
        assert torch.equal(node(x), untouched)
        assert not calls


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("called", [False, True])
def test_backward_hooks(part: str, called: bool) -> None:
    node, x = adapted(), torch.randn(3, INPUTS, requires_grad=True)
    if called:
        node(x)
    calls: list[str] = []
    module = seen_by(node, part)
    handles = [
        module.register_full_backward_hook(lambda *_: calls.append("after")),
        module.register_full_backward_pre_hook(lambda *_: calls.append("before")),
    ]
    node(x).sum().backward()
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    node(x).sum().backward()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("called", [False, True])
def test_hooks_on_all_modules(called: bool) -> None:
    node, x = adapted(), torch.randn(3, INPUTS)
    if called:
        node(x)
    calls: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        node(x)
    finally:
        handle.remove()
    assert set(calls) == {node, node.base, branch_of(node), *branch_of(node)._modules.values()}
    calls.clear()
    assert is_short(node, x)
    node(x)
    assert not calls


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _replace_a(branch: Any) -> None:
    branch._modules["lora_A"] = nn.Linear(INPUTS, 2)


def _own_values(module: nn.Module, name: str) -> None:
    value = module._parameters.pop(name)
    assert value is not None
    module.register_buffer(name, value.detach() * 2)


CHANGES: dict[str, Callable[[AdaptedLayer, Any], object]] = {
    "A is another layer": lambda node, branch: _replace_a(branch),
    "A has a bias": lambda node, branch: setattr(branch.lora_A, "bias", nn.Parameter(torch.ones(2))),
    "B has a bias": lambda node, branch: setattr(branch.lora_B, "bias", nn.Parameter(torch.ones(OUTPUTS))),
    "B has a bias that is a buffer": lambda node, branch: (
        branch.lora_B._parameters.pop("bias"),
        branch.lora_B.register_buffer("bias", torch.ones(OUTPUTS)),
    ),
    "more in the branch": lambda node, branch: branch.insert(1, fl.Multiply(3.0)),
    "more at its end": lambda node, branch: branch.append(fl.Multiply(3.0)),
    "less in the branch": lambda node, branch: branch.remove(branch.Multiply),
    "another scale": lambda node, branch: setattr(branch.Multiply, "scale", 7),
    "a tensor for a scale": lambda node, branch: setattr(branch.Multiply, "scale", torch.tensor(3.0)),
    "a scale for each": lambda node, branch: setattr(branch.Multiply, "scale", torch.tensor([3.0, 4.0])),
    "a trained scale": lambda node, branch: setattr(branch.Multiply, "scale", nn.Parameter(torch.tensor(3.0))),
    "an offset": lambda node, branch: setattr(branch.Multiply, "bias", 1.0),
    "an offset for each": lambda node, branch: setattr(branch.Multiply, "bias", torch.tensor([3.0, 4.0])),
    "a parametrized weight": lambda node, branch: parametrize.register_parametrization(node.base, "weight", Twice()),
    "a parametrized bias": lambda node, branch: parametrize.register_parametrization(node.base, "bias", Twice()),
    "a parametrized A": lambda node, branch: parametrize.register_parametrization(branch.lora_A, "weight", Twice()),
    "a parametrized B": lambda node, branch: parametrize.register_parametrization(branch.lora_B, "weight", Twice()),
    "a spectral norm": lambda node, branch: nn.utils.parametrizations.spectral_norm(branch.lora_A),
    "a weight that is a buffer": lambda node, branch: _own_values(node.base, "weight"),
    "a bias that is a buffer": lambda node, branch: _own_values(node.base, "bias"),
    "an A that is a buffer": lambda node, branch: _own_values(branch.lora_A, "weight"),
    "another weight": lambda node, branch: setattr(node.base, "weight", nn.Parameter(torch.randn(OUTPUTS, INPUTS))),
    "no bias": lambda node, branch: setattr(node.base, "bias", None),
    "another A": lambda node, branch: setattr(branch.lora_A, "weight", nn.Parameter(torch.randn(2, INPUTS))),
    "another rank": lambda node, branch: (
        setattr(branch.lora_A, "weight", nn.Parameter(torch.randn(3, INPUTS))),
        setattr(branch.lora_B, "weight", nn.Parameter(torch.randn(OUTPUTS, 3))),
    ),
    "a pruned bias": lambda node, branch: prune.l1_unstructured(node.base, "bias", 0.5),
    "a pruned A": lambda node, branch: prune.l1_unstructured(branch.lora_A, "weight", 0.5),
    "another strength": lambda node, branch: setattr(branch.switch, "scale", 0.3),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [nn.Linear, fl.Linear])
def test_changes_by_hand(change: str, called: bool, kind: type[nn.Linear]) -> None:
    node, x = adapted(kind=kind), torch.randn(3, INPUTS)
    before = copy.deepcopy(node)(x)
    if called:
        node(x)
    CHANGES[change](node, branch_of(node))
    node.eval()  # A spectral norm takes a step in each call in training.
    for _ in range(2):
        found = node(x)
        close(found, long_way(node, x))
        assert not torch.allclose(found, before)


def test_a_trained_scale_gets_a_gradient() -> None:
    node = adapted()
    scale = branch_of(node).Multiply.scale = nn.Parameter(torch.tensor(3.0))
    node(torch.randn(3, INPUTS)).sum().backward()
    assert scale.grad is not None and scale.grad != 0


@pytest.mark.parametrize("part", PARTS)
def test_compiled_modules(part: str) -> None:
    torch._dynamo.reset()
    node, x = adapted(), torch.randn(3, INPUTS)
    module, expected = seen_by(node, part), node(x)
    for _ in range(2):
        calls: list[Any] = []
        module.compile(backend="eager")
        compiled: Any = module._compiled_call_impl

        def count(*args: Any, compiled: Any = compiled, calls: list[Any] = calls) -> Any:
            calls.append(args)
            return compiled(*args)

        module._compiled_call_impl = count  # type: ignore[assignment]
        close(node(x), expected)
        assert calls
        module._compiled_call_impl = None
        close(node(x), expected)


def test_a_class_with_a_call_of_its_own() -> None:
    class Shifted(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) + 1

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    x = torch.randn(3, INPUTS)
    for kind in (Shifted, Doubled):
        node = adapted(kind=kind)
        close(node(x), long_way(node, x))
        assert not is_short(node, x)


@pytest.mark.parametrize("kind", [nn.Linear, fl.Linear])
def test_a_class_that_is_patched(kind: type[nn.Linear], monkeypatch: pytest.MonkeyPatch) -> None:
    node, x = adapted(kind=kind), torch.randn(3, INPUTS)
    before, forward = node(x), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    close(node(x), long_way(node, x))
    assert not torch.allclose(node(x), before)


def test_a_method_that_is_made_of_lora() -> None:
    class Mine(LoRA):
        def run(self, branch: Branch, layer: Any, scale: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return layer(x) * 2

    node, x = adapted(Mine(rank=2)), torch.randn(3, INPUTS)
    close(node(x), node.base(x) * 2)


def test_adapters_written_by_hand() -> None:
    class Tripled(fl.Chain, adapters.Adapter[nn.Module]):
        def __init__(self, target: nn.Module) -> None:
            with self.setup_adapter(target):
                super().__init__(target, fl.Multiply(3.0))

    node, x = adapted(kind=fl.Linear), torch.randn(3, INPUTS)
    expected, base = node(x), node.base(x)
    inside = Tripled(node.base)
    inside.inject(node)
    close(node(x), expected + 2 * base)
    inside.eject()
    assert torch.equal(node(x), expected)


# Other uses of torch


def test_functional_call() -> None:
    node, x = adapted(), torch.randn(3, INPUTS)
    model = node.__dict__["model"]
    for plain in (True, False):
        values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        other = copy.deepcopy(model)
        other.load_state_dict(values)
        if not plain:
            values = {name: nn.Parameter(value) for name, value in values.items()}
        close(torch.func.functional_call(model, values, (x,)), other(x))


def test_transforms_of_functions() -> None:
    node, x = adapted(dtype=torch.float64), torch.randn(4, 3, INPUTS, dtype=torch.float64)
    model = node.__dict__["model"]
    node(x)
    close(torch.func.vmap(node)(x), node(x))
    close(torch.func.vmap(node)(x[:, 0]), node(x[:, 0]))
    assert torch.func.grad(lambda x: node(x).square().sum())(x).shape == x.shape
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(node, (x,), (tangent,))
    expected = long_way(node, tangent) - nn.functional.linear(torch.zeros_like(x), node.base.weight, node.base.bias)
    close(found, expected)

    values = {name: value.detach() for name, value in model.named_parameters()}
    gradients = torch.func.grad(lambda v: torch.func.functional_call(model, v, (x,)).square().sum())(values)
    node.requires_grad_(True)
    node(x).square().sum().backward()
    for name, value in model.named_parameters():
        close(gradients[name], value.grad)

    stacked = {name: torch.stack([value, value * 2]) for name, value in values.items()}
    both = torch.func.vmap(lambda v: torch.func.functional_call(model, v, (x,)))(stacked)
    close(both[0], node(x))


def test_forward_mode() -> None:
    node, x = adapted(dtype=torch.float64), torch.randn(3, INPUTS, dtype=torch.float64)
    tangent = torch.randn_like(x)
    node(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(node(forward_ad.make_dual(x, tangent))).tangent
    zero = torch.zeros_like(x)
    close(found, long_way(node, tangent) - long_way(node, zero))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_jacobians(vectorize: bool, shape: tuple[int, ...]) -> None:
    node, x = adapted(), torch.randn(*shape, INPUTS)
    found = torch.autograd.functional.jacobian(node, x, vectorize=vectorize)
    expected = torch.autograd.functional.jacobian(lambda x: long_way(node, x), x)
    close(found, expected)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base: torch.dtype) -> None:
    node, x = adapted(dtype=base), torch.randn(3, INPUTS)
    node(x.to(base))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_short(node, x.to(base))
        assert node(x).dtype is torch.bfloat16
        assert torch.equal(node(x), long_way(node, x))


def test_inputs_of_other_kinds() -> None:
    node = adapted()
    vector = torch.randn(INPUTS)
    close(node(vector), long_way(node, vector))
    parameter = nn.Parameter(torch.randn(3, INPUTS))
    close(node(parameter), long_way(node, parameter))
    close(node(input=parameter), long_way(node, parameter))
    with pytest.raises(RuntimeError, match="dtype"):
        node(torch.randn(3, INPUTS, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        node(torch.randn(3, INPUTS + 1))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_meta_tensors(dropout: float) -> None:
    node = adapted(LoRA(rank=2, dropout=dropout))
    with torch.device("meta"):
        assert node(torch.randn(3, INPUTS, device="cpu")).device.type == "cpu"
    node.to("meta")
    node(torch.randn(2, 3, INPUTS, device="meta")).sum().backward()
    assert node(torch.randn(2, 3, INPUTS, device="meta")).shape == (2, 3, OUTPUTS)


def test_copies() -> None:
    node, x = adapted(LoRA(rank=2), LoRA(rank=3)), torch.randn(3, INPUTS)
    model = node.__dict__["model"]
    expected = node(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fl.Chain(node).structural_copy()):
        assert torch.equal(twin(x), expected)
        other = next(module for module in twin.modules() if isinstance(module, AdaptedLayer))
        assert is_short(other, x)
        other.branches[0].register_forward_hook(shift)
        assert not torch.allclose(twin(x), expected)
        assert torch.equal(node(x), expected)


def test_merged_and_switched_off() -> None:
    node, x = adapted(LoRA(rank=2), LoRA(rank=3)), torch.randn(3, INPUTS)
    expected, base = node(x), node.base(x)
    patch = adapters.patches(node.__dict__["model"])["a"]
    patch.merge()
    close(node(x), expected)
    patch.unmerge()
    assert torch.equal(node(x), expected)
    with adapters.use(node.__dict__["model"]):
        assert torch.equal(node(x), base)


# Rows


CHOICES: list[Any] = [None, "a", "b", "c", ["a", "b"], {"a": 0.5}, {"a": -1.0, "c": 2.0}, "elsewhere"]


@examples(25, 60)
@given(
    rows=st.lists(st.sampled_from(CHOICES), min_size=1, max_size=9),
    ordered=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    shape=st.sampled_from([(), (1,), (3,), (2, 2), (33,)]),  # With many tokens, rows are not sorted.
    swapped=st.booleans(),
    grad=st.booleans(),
)
def test_each_row_gets_what_it_gets_alone(
    rows: list[Any], ordered: bool, dtype: torch.dtype, shape: tuple[int, ...], swapped: bool, grad: bool
) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Linear(OUTPUTS, OUTPUTS)).to(dtype)
    for name, method in {"a": LoRA(rank=2, alpha=3), "b": LoRA(rank=2), "c": LoRA(rank=4)}.items():
        perturb(adapters.inject(model, method, targets=["0"], name=name), seed=ord(name))
    perturb(adapters.inject(model, LoRA(rank=2), targets=["1"], name="elsewhere"))
    if ordered:
        rows = sorted(rows, key=str)
    x = torch.randn(len(rows), *shape, INPUTS).to(dtype)
    if swapped and shape:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with torch.set_grad_enabled(grad):
        with adapters.use(model, rows=rows):
            node = model[0]
            if not grad:
                assert is_short(node, x)
            found, before = node(x), x.clone()
        assert torch.equal(x, before)
        for number, row in enumerate(rows):
            choice = [] if row is None else [row] if isinstance(row, str) else row
            with adapters.use(model, choice):
                expected = node(x[number : number + 1])
            torch.testing.assert_close(found[number : number + 1], expected, rtol=0.02, atol=0.02) if (
                dtype is torch.bfloat16
            ) else close(found[number : number + 1], expected)


def test_gradients_of_rows() -> None:
    node = adapted(LoRA(rank=2), LoRA(rank=3), dtype=torch.float64)
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    with adapters.use(node.__dict__["model"], rows=["b", None, "a", "b"]):
        assert torch.autograd.gradcheck(lambda *_: node(x), (x, *node.branches[1].parameters()))
        node.base.bias.requires_grad_(True)  # type: ignore[union-attr]
        for branch in node.branches:
            branch.requires_grad_(False)
        node(x.detach()).sum().backward()
    close(node.base.bias.grad, torch.full((OUTPUTS,), 4.0, dtype=torch.float64))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called_for_rows(part: str) -> None:
    node, x, calls = adapted(), torch.randn(3, INPUTS), []
    with torch.no_grad(), adapters.use(node.__dict__["model"], rows=["a", None, "a"]):
        expected = node(x)
        seen_by(node, part).register_forward_hook(lambda *_: calls.append(1))
        close(node(x), expected)
    assert calls


@pytest.mark.parametrize("change", CHANGES)
def test_changes_by_hand_between_calls_for_rows(change: str) -> None:
    node, x = adapted(), torch.randn(3, INPUTS)
    with torch.no_grad(), adapters.use(node.__dict__["model"], rows=["a", None, "a"]):
        before = node(x)
        CHANGES[change](node, branch_of(node))
        node.eval()
        for _ in range(2):
            found = node(x)
            close(found, long_way(node, x))
            assert torch.allclose(found, before) == (change == "another strength")  # It was looked up on entering.


def test_groups_of_one_size_keep_their_own_strengths() -> None:
    """In the dtypes in which they go through one product."""
    node, x = adapted(LoRA(rank=2, alpha=20), dtype=torch.bfloat16), torch.randn(4, INPUTS).bfloat16()
    model = node.__dict__["model"]
    with torch.no_grad():
        with adapters.use(model, rows=["a", {"a": -1.0}, {"a": -1.0}, "a"]):
            assert is_short(node, x)
            found = node(x)
        with adapters.use(model, "a"):
            one = node(x)
        with adapters.use(model, {"a": -1.0}):
            other = node(x)
    assert (one - other).abs().max() > 1
    expected = torch.stack([one[0], other[1], other[2], one[3]])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
