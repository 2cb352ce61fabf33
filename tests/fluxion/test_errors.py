"""Errors: their type stays, the place in the tree is added once, and no check is an assert."""

import ast
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fluxion as fl


class With_Underscores(fl.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory left")


def note_of(error: BaseException) -> str:
    (note,) = error.__notes__
    return str(note)


def test_the_place_in_the_tree() -> None:
    chain = fl.Chain(
        fl.Identity(),
        fl.Sum(
            fl.Linear(2, 2), fl.Chain(fl.ReLU(), fl.Linear(2, 3), With_Underscores(), With_Underscores(), fl.Tanh())
        ),
    )
    with pytest.raises(torch.OutOfMemoryError) as caught:
        chain(torch.ones(4, 2))
    assert str(caught.value) == "no memory left"
    assert note_of(caught.value) == textwrap.dedent("""\
        Chain.Sum.Chain.With_Underscores_1 failed on (Tensor(shape=(4, 3), dtype=float32, device=cpu))
            (CHAIN)
                └── (SUM)
                    └── (CHAIN)
                        ├── ReLU()
                        ├── Linear(in_features=2, out_features=3, device=cpu, dtype=float32)
        >>>             ├── With_Underscores()
                        ├── With_Underscores()
                        └── Tanh()""")
    printed = "".join(traceback.format_exception(caught.value))
    assert printed.count(">>>") == 1


@pytest.mark.parametrize("depth", [1, 60, 200])
@pytest.mark.parametrize("kind", [fl.Chain, fl.Residual, fl.Sum])
def test_added_once_however_deep(kind: type[fl.Chain], depth: int) -> None:
    original = KeyError("mine")

    def fail(x: Tensor) -> Tensor:
        raise original

    chain = fl.Chain(fl.Lambda(fail))
    for _ in range(depth):
        chain = kind(chain)
    with pytest.raises(KeyError) as caught:
        chain(torch.ones(1))
    assert caught.value is original
    assert caught.value.__cause__ is caught.value.__context__ is None
    note = note_of(caught.value)
    assert len(note) < 500 + 12 * depth  # The path grows with the depth, nothing else does.
    assert note.count("\n") < 12


@pytest.mark.parametrize(
    "failing",
    [
        fl.Parallel(fl.Identity(), fl.Linear(9, 9)),
        fl.Distribute(fl.Linear(9, 9)),
        fl.Sum(fl.Identity(), fl.Linear(9, 9)),
        fl.Concatenate(fl.Identity(), fl.Linear(9, 9)),
        fl.Matmul(fl.Identity(), fl.Linear(9, 9)),
        fl.Residual(fl.Linear(9, 9)),
        fl.Passthrough(fl.Linear(9, 9)),
    ],
    ids=lambda chain: type(chain).__name__,
)
def test_every_combinator_names_the_child(failing: fl.Chain) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as caught:
        failing(torch.ones(2, 3))
    path = f"{type(failing).__name__}.Linear failed on (Tensor(shape=(2, 3)"
    assert note_of(caught.value).startswith(path)


def test_through_plain_modules_and_other_roots() -> None:
    inner = fl.Chain(fl.Linear(9, 9))
    outer = fl.Chain(fl.Lambda(inner), nn.Identity())
    with pytest.raises(RuntimeError) as caught:
        outer(torch.ones(2, 3))
    assert note_of(caught.value).startswith("Chain.Linear failed on")


def test_an_error_of_a_combinator_itself() -> None:
    with pytest.raises(fl.ChainValueError, match="Distribute has 2 children but was given 1 inputs"):
        fl.Distribute(fl.Identity(), fl.Identity())(torch.ones(1))
    with pytest.raises(fl.ChainValueError, match="was given 2"):
        fl.Residual(fl.Identity())(torch.ones(1), torch.ones(1))
    with pytest.raises(RuntimeError) as caught:
        fl.Chain(fl.Residual(fl.Linear(3, 4)))(torch.ones(2, 3))
    assert note_of(caught.value).startswith("Chain.Residual failed on (Tensor(shape=(2, 3)")


def test_arguments_of_any_kind_are_told_in_short() -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError("this error must not hide the first one")

    def fail(*args: object) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError) as caught:
        fl.Chain(fl.Lambda(fail))(Unprintable(), [torch.ones(1)], {"a": torch.ones(2)}, "x" * 1000, None)
    first, *_ = note_of(caught.value).splitlines()
    tensor = "Tensor(shape=({}), dtype=float32, device=cpu)"
    told = f"(<Unprintable>, ({tensor.format(1)}), {{'a': {tensor.format(2)}}}, '{'x' * 76}..., None)"
    assert first == f"Chain.Lambda failed on {told}"


def test_few_siblings_are_shown() -> None:
    chain = fl.Chain(fl.Identity() for _ in range(100))
    chain[50] = With_Underscores()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        chain(torch.ones(1))
    lines = note_of(caught.value).splitlines()[1:]
    assert len(lines) == 10
    assert lines[0].strip() == "(CHAIN)"
    assert lines[5].startswith(">>>")
    assert lines[1].endswith("├── ...")
    assert lines[-1].endswith("└── ...")


def test_types_are_the_usual_ones_too() -> None:
    assert issubclass(fl.ChainTypeError, TypeError)
    assert issubclass(fl.ChainValueError, ValueError)
    assert issubclass(fl.ChildNotFoundError, KeyError)
    assert issubclass(fl.ChildNotFoundError, IndexError)
    assert issubclass(fl.ContextError, LookupError)
    for error in (fl.ChainTypeError, fl.ChainValueError, fl.ChildNotFoundError, fl.ContextError):
        assert issubclass(error, fl.ChainError)
        assert issubclass(error, RuntimeError)
        assert str(error("a sentence")) == "a sentence"


CHECKS = """
import fluxion as fl
assert False, "this does not run under -O"
child = fl.Chain()
home = fl.Chain(child)
attempts = [
    (TypeError, lambda: home.append(None)),
    (TypeError, lambda: fl.Chain("x")),
    (ValueError, lambda: fl.Chain(child)),
    (ValueError, lambda: home.append(home)),
    (ValueError, lambda: home.remove(fl.ReLU())),
    (ValueError, lambda: fl.UseContext("a", "b").ensure_parent),
    (ValueError, lambda: fl.Distribute(fl.Identity())(1, 2)),
    (TypeError, lambda: home.layer(0, fl.Linear)),
    (LookupError, lambda: home.ensure_find(fl.Linear)),
    (LookupError, lambda: home.ensure_find_parent(fl.ReLU())),
    (LookupError, lambda: fl.Chain(fl.UseContext("a", "b"))(1)),
]
for kind, attempt in attempts:
    try:
        attempt()
    except kind:
        continue
    raise SystemExit(f"{kind.__name__} was not raised")
print(len(attempts), len(home))
"""


def test_checks_hold_without_asserts() -> None:
    done = subprocess.run([sys.executable, "-O", "-c", CHECKS], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("11 1\n", "")


def test_no_assert_in_the_package() -> None:
    package = Path(fl.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
