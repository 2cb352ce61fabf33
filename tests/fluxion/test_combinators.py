"""What each combinator computes, and that torch's own tools take all of them."""

import copy
import io
import pickle
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils import _pytree as pytree

import fluxion as fl

X, Y = torch.randn(2, 3), torch.randn(2, 3)
TWO = fl.Multiply(2.0)
Pair = namedtuple("Pair", ["left", "right"])


def test_chain() -> None:
    assert torch.equal(fl.Chain(TWO, fl.Multiply(1.0, 3.0))(X), 2 * X + 3)
    assert fl.Chain()(X) is X
    assert fl.Chain()(X, Y) == (X, Y)


def test_a_tuple_becomes_several_inputs_and_leaves_as_it_is() -> None:
    swap = fl.Lambda(lambda x, y: (y, x))
    assert fl.Chain(swap)(X, Y) == (Y, X)
    assert torch.equal(fl.Chain(swap, fl.Lambda(torch.sub))(X, Y), Y - X)
    assert fl.Chain(fl.Lambda(lambda x: (x,)))(X) == (X,)
    assert torch.equal(fl.Chain(fl.Lambda(lambda x: Pair(x, 2 * x)), fl.Lambda(torch.add))(X), 3 * X)
    assert torch.equal(fl.Chain(fl.Lambda(lambda x: x.max(dim=1)), fl.GetArg(1))(X), X.argmax(dim=1))
    listed = fl.Chain(fl.Lambda(lambda x: [x, x]), fl.Lambda(lambda both: both[0]))
    assert listed(X) is X


def test_parallel() -> None:
    left, right = fl.Parallel(TWO, fl.Identity())(X)
    assert torch.equal(left, 2 * X)
    assert right is X
    assert fl.Parallel(fl.GetArg(1), fl.GetArg(0))(X, Y) == (Y, X)
    assert fl.Parallel()(X) == ()


def test_distribute() -> None:
    left, right = fl.Distribute(TWO, fl.Identity())(X, Y)
    assert torch.equal(left, 2 * X)
    assert right is Y


def test_passthrough() -> None:
    seen: list[Tensor] = []
    chain = fl.Passthrough(TWO, fl.Lambda(seen.append))
    assert chain(X) is X
    assert torch.equal(seen[0], 2 * X)
    assert fl.Passthrough(fl.GetArg(0))(X, Y) == (X, Y)


def test_sum() -> None:
    assert torch.equal(fl.Sum(TWO, fl.Multiply(3.0))(X), 2 * X + 3 * X)
    assert torch.equal(fl.Sum(fl.Parallel(TWO, TWO), fl.Identity())(X), 2 * X + 2 * X + X)
    assert fl.Sum(fl.Lambda(lambda _: "a"), fl.Lambda(lambda _: "b"))(X) == "ab"
    with pytest.raises(fl.ChainValueError, match="nothing to add"):
        fl.Sum()(X)


def test_residual() -> None:
    assert torch.equal(fl.Residual(TWO, TWO)(X), 4 * X + X)
    with pytest.raises(fl.ChainValueError, match="adds its one input"):
        fl.Residual(TWO)(X, Y)


def test_concatenate() -> None:
    assert torch.equal(fl.Concatenate(TWO, fl.Identity())(X), torch.cat([2 * X, X]))
    skipping = fl.Concatenate(TWO, fl.Lambda(lambda _: None), fl.Identity(), dim=-1)
    assert torch.equal(skipping(X), torch.cat([2 * X, X], dim=-1))


def test_matmul() -> None:
    assert torch.equal(fl.Matmul(TWO, fl.Transpose(0, 1))(X), 2 * X @ X.T)


def test_get_arg_and_lambda() -> None:
    assert fl.GetArg(-1)(X, Y) is Y
    assert fl.Lambda(lambda: 3)() == 3


# Torch's tools


class WithContext(fl.Chain):
    def init_context(self) -> fl.Contexts:
        return {"kept": {"x": None}}


MODELS: dict[str, Callable[[], fl.Chain]] = {
    "Chain": lambda: fl.Chain(fl.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3))),
    "Parallel": lambda: fl.Parallel(fl.Linear(3, 3), fl.Identity()),
    "Distribute": lambda: fl.Chain(
        fl.Parallel(fl.Identity(), fl.Identity()), fl.Distribute(fl.Linear(3, 3), fl.ReLU())
    ),
    "Passthrough": lambda: fl.Chain(fl.Passthrough(fl.Linear(3, 3)), fl.Linear(3, 1)),
    "Sum": lambda: fl.Sum(fl.Linear(3, 3), fl.Chain(fl.Linear(3, 3), fl.Parallel(fl.Identity(), fl.Tanh()))),
    "Residual": lambda: fl.Residual(fl.Linear(3, 3), fl.Residual(fl.Linear(3, 3))),
    "Concatenate": lambda: fl.Concatenate(fl.Linear(3, 3), fl.Linear(3, 3), dim=1),
    "Matmul": lambda: fl.Matmul(fl.Linear(3, 3), fl.Chain(fl.Linear(3, 3), fl.Transpose(0, 1))),
    "UseContext": lambda: WithContext(
        fl.SetContext("kept", "x"), fl.Linear(3, 3), fl.Sum(fl.Identity(), fl.UseContext("kept", "x"))
    ),
    "SelfAttention": lambda: fl.Chain(fl.Unsqueeze(0), fl.SelfAttention(3)),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(pytree.tree_leaves(left), pytree.tree_leaves(right))


@every_model
@pytest.mark.parametrize("strict", [True, False])
def test_export(model: Callable[[], fl.Chain], strict: bool) -> None:
    chain = model()
    program = torch.export.export(chain, (X,), strict=strict)
    assert_same(program.module()(Y), chain(Y))
    assert set(program.state_dict) == set(chain.state_dict())


@every_model
def test_compile_in_one_graph(model: Callable[[], fl.Chain]) -> None:
    torch._dynamo.reset()
    chain = model()
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(compiled(Y), chain(Y))
    pytree.tree_leaves(compiled(X))[0].sum().backward()


@every_model
def test_compile_in_place(model: Callable[[], fl.Chain]) -> None:
    torch._dynamo.reset()
    chain = model()
    expected = chain(Y)
    chain.compile(fullgraph=True, backend="eager")
    assert_same(chain(Y), expected)


@every_model
def test_deepcopy_pickle_and_save(model: Callable[[], fl.Chain]) -> None:
    chain = model()
    file = io.BytesIO()
    torch.save(chain, file)
    file.seek(0)
    for clone in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)), torch.load(file, weights_only=False)):
        assert_same(clone(X), chain(X))
        assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in chain.parameters()}


@every_model
def test_state_dict(model: Callable[[], fl.Chain]) -> None:
    chain, other = model(), model()
    other.load_state_dict(chain.state_dict())
    assert_same(other(X), chain(X))


@every_model
def test_to_another_dtype_and_device(model: Callable[[], fl.Chain]) -> None:
    chain = model()
    expected = chain(X)
    double = chain.to(torch.float64)(X.double())
    torch.testing.assert_close(pytree.tree_leaves(double), pytree.tree_leaves(expected), check_dtype=False)
    shapes = [leaf.shape for leaf in pytree.tree_leaves(expected)]
    on_meta = chain.to("meta")(X.double().to("meta"))
    assert [(leaf.device.type, leaf.shape) for leaf in pytree.tree_leaves(on_meta)] == [("meta", s) for s in shapes]
    with torch.device("meta"):
        fresh = model()
    assert {p.device.type for p in fresh.parameters()} <= {"meta"}
    assert fresh.to_empty(device="cpu")(X) is not None


@every_model
def test_functional_call(model: Callable[[], fl.Chain]) -> None:
    chain, other = model(), model()
    weights = {name: tensor.clone() for name, tensor in other.named_parameters()}
    before = chain(X)
    assert_same(torch.func.functional_call(chain, weights, X), other(X))
    assert_same(chain(X), before)


@every_model
def test_vmap_and_grad(model: Callable[[], fl.Chain]) -> None:
    chain = model()

    def total(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        leaves = pytree.tree_leaves(torch.func.functional_call(chain, weights, x))
        return torch.stack([leaf.square().sum() for leaf in leaves]).sum()

    weights = dict(chain.named_parameters())
    batched = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(weights, torch.stack([X, Y]))
    for row, x in enumerate((X, Y)):
        assert_same({k: v[row] for k, v in batched.items()}, torch.func.grad(total)(weights, x))


# Hooks, and other things put between a call and `forward`


def test_hooks_run_at_every_level() -> None:
    told: list[str] = []
    inner = fl.Chain(fl.Linear(3, 3))
    chain = fl.Chain(fl.Sum(inner, fl.Identity()))
    for name, module in (("root", chain), ("sum", chain.Sum), ("inner", inner), ("leaf", inner.Linear)):
        module.register_forward_hook(lambda *_, name=name: told.append(name))
        module.register_forward_pre_hook(lambda *_, name=name: told.append(f"before {name}"))
    inner.Linear.register_full_backward_hook(lambda *_: told.append("backward"))
    chain(X.clone().requires_grad_()).sum().backward()
    levels = ["root", "sum", "inner", "leaf"]
    assert told == [f"before {name}" for name in levels] + levels[::-1] + ["backward"]


def test_global_hooks_see_every_module() -> None:
    chain = fl.Chain(fl.Sum(fl.Linear(3, 3), fl.Identity()))
    told: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: told.append(module)):
        chain(X)
    assert set(told) == set(chain.modules())


def test_hooks_may_change_what_passes() -> None:
    chain = fl.Chain(fl.Identity(), fl.Identity())
    chain[0].register_forward_hook(lambda module, args, output: output + 1)
    chain[1].register_forward_pre_hook(lambda module, args: (args[0] * 10,))
    assert chain(torch.zeros(1)) == 10


def test_a_leaf_with_a_call_of_its_own() -> None:
    class Counting(fl.Module):
        calls = 0

        def __call__(self, *args: Any) -> Any:
            self.calls += 1
            return super().__call__(*args)

        def forward(self, x: Tensor) -> Tensor:
            return x

    leaf = Counting()
    fl.Chain(fl.Chain(leaf))(X)
    assert leaf.calls == 1


def test_a_forward_set_on_the_object() -> None:
    chain = fl.Chain(fl.Identity())
    chain[0].forward = lambda x: x + 1
    assert chain(torch.zeros(1)) == 1


def test_compiled_leaves() -> None:
    torch._dynamo.reset()

    class Double(fl.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    wrapped, in_place = torch.compile(nn.Linear(3, 3), backend="eager"), Double()
    expected = in_place(wrapped(X))
    counter = CompileCounter()
    in_place.compile(backend=counter)
    assert torch.equal(fl.Chain(wrapped, in_place)(X), expected)
    assert counter.frame_count == 1


def test_checkpointing() -> None:
    block = fl.Residual(fl.Linear(3, 3))
    chain = fl.Chain(fl.Lambda(lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)))
    chain(X.clone().requires_grad_()).sum().backward()
    assert block.Linear.weight.grad is not None
