"""Ten thousand random changes to random trees, each checked against a model made of plain lists.

The model knows nothing of keys, links and indices inside a chain: it lists the children of every chain, and computes
from these lists what the real trees must say of themselves. It also foretells which calls are refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import fluxion as fl
from tests.thinned import exhaustive


class Shift(fl.ContextModule):
    """A leaf with a parent link."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: float) -> float:
        return x + self.by


class Block(fl.Chain):
    pass


class Block_1(fl.Residual):
    """Named like the key of a repeated `Block`."""


KINDS: list[type[fl.Chain]] = [fl.Chain, Block, Block_1, fl.Sum, fl.Passthrough]
Leaf = nn.Module


class Node:
    """The model of one chain: its children, as nodes or leaves, and the keys that they were given."""

    def __init__(self, chain: fl.Chain) -> None:
        self.chain = chain
        self.children: list[Node | Leaf] = []
        self.keys: list[str] = []

    def modules(self) -> list[nn.Module]:
        return [child.chain if isinstance(child, Node) else child for child in self.children]

    def below(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.below()

    def run(self, x: float) -> float:
        """What the chain computes, from the lists alone."""
        outputs, value = [], x
        for child in self.children:
            into = x if isinstance(self.chain, fl.Sum) else value
            value = child.run(into) if isinstance(child, Node) else child.forward(into)
            outputs.append(value)
        if isinstance(self.chain, fl.Sum):
            if not outputs:
                raise ValueError
            total = outputs[0]
            for output in outputs[1:]:
                total = total + output
            return total
        if isinstance(self.chain, fl.Passthrough):
            return x
        return value + x if isinstance(self.chain, fl.Residual) else value


class World:
    """Some trees, their models, and random calls on them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.leaves: list[Leaf] = [fl.Multiply(0.5), fl.Multiply(-1.0, 1.0), nn.Identity(), Shift(1.0), Shift(-0.25)]
        self.roots = [Node(fl.Chain())]
        self.refused = 0

    # The state

    def nodes(self) -> list[Node]:
        return [node for root in self.roots for node in root.below()]

    def parent_of(self, child: Node | Leaf) -> Node | None:
        return next((node for node in self.nodes() if any(item is child for item in node.children)), None)

    def ancestors(self, node: Node | None) -> list[Node]:
        out = []
        while node is not None:
            out.append(node)
            node = self.parent_of(node)
        return out

    def refusal(self, into: Node, child: Any) -> type[Exception] | None:
        """The error that putting a child into a chain must raise."""
        if not isinstance(child, (Node, nn.Module)):
            return TypeError
        if isinstance(child, Node) and (child in self.ancestors(into) or self.parent_of(child) is not None):
            return ValueError
        if isinstance(child, Shift) and self.parent_of(child) not in (None, into):
            return ValueError
        return None

    def snapshot(self) -> list[object]:
        return [
            (id(node.chain), key, id(child), id(child.parent) if isinstance(child, fl.ContextModule) else None)
            for node in self.nodes()
            for key, child in node.chain._modules.items()
        ]

    # The checks

    def check(self) -> None:
        for root in self.roots:
            assert root.chain.parent is None
            paths: list[str] = []
            order: list[nn.Module] = []
            self.check_node(root, type(root.chain).__name__, order, paths)
            assert [module for module, _ in root.chain.walk(recurse=True)] == order
            names = root.chain.named_modules(remove_duplicate=False)
            assert [name for name, _ in names] == ["", *(path.split(".", 1)[1] for path in paths)]
            self.check_run(root)
        for leaf in self.leaves:
            if isinstance(leaf, Shift) and self.parent_of(leaf) is None:
                assert leaf.parent is None

    def check_node(self, node: Node, path: str, order: list[nn.Module], paths: list[str]) -> None:
        chain, modules = node.chain, node.modules()
        assert list(chain) == modules
        assert list(chain._modules) == node.keys
        assert len(chain) == len(node.keys) == len(set(node.keys))
        assert chain.get_path() == path
        for place, (key, child, module) in enumerate(zip(node.keys, node.children, modules, strict=True)):
            assert chain[key] is chain[place] is chain[place - len(modules)] is module
            assert chain.key_of(module) == node.keys[modules.index(module)]
            assert module in chain
            order.append(module)
            paths.append(f"{path}.{key}")
            if isinstance(child, Node):
                assert child.chain.parent is chain
                self.check_node(child, f"{path}.{key}", order, paths)
            elif isinstance(child, Shift):
                assert child.parent is chain

    def check_run(self, root: Node) -> None:
        try:
            expected = root.run(1.0)
        except ValueError:
            with pytest.raises(ValueError, match="nothing to add"):
                root.chain(1.0)
        else:
            out = root.chain(1.0)
            assert out == expected or (out != out and expected != expected)

    # The steps

    def step(self) -> None:
        actions = [self.insert] * 5 + [self.extend, self.by_type, self.take, self.take, self.put, self.put]
        actions += [self.wrap, self.copy, self.slice]
        self.random.choice(actions)()
        while len(self.nodes()) > 60 or len(self.roots) > 8:
            for node in list(self.roots.pop(self.random.randrange(len(self.roots))).below()):
                while len(node.chain):
                    node.chain.pop()
        while len(self.roots) < 3:
            self.roots.append(Node(self.random.choice(KINDS)()))

    def node(self) -> Node:
        return self.random.choice(self.nodes())

    def candidate(self) -> Any:
        """Something to put in a chain, which is not always possible."""
        kind = self.random.random()
        if kind < 0.45:
            return self.random.choice(self.leaves)
        if kind < 0.7:
            return Node(self.random.choice(KINDS)())
        if kind < 0.95:
            return self.node()
        return self.random.choice([None, "x", 3, nn.Linear])

    def attempt(self, call: Callable[[], Any], error: type[Exception] | None) -> bool:
        """Make a call that must raise an error and change nothing, or else succeed."""
        if error is None:
            call()
            return True
        before = self.snapshot()
        with pytest.raises(error):
            call()
        assert self.snapshot() == before
        self.refused += 1
        return False

    def arrive(self, into: Node, index: int, children: list[Any]) -> None:
        """Children were put at an index. Their keys are new; those of the others stay as they were."""
        keys = list(into.chain._modules)[index : index + len(children)]
        for key, child in zip(keys, children, strict=True):
            name = type(child.chain if isinstance(child, Node) else child).__name__
            assert key not in into.keys
            assert key == name or key.removeprefix(f"{name}_").isdecimal()
        into.children[index:index] = children
        into.keys[index:index] = keys
        self.roots = [root for root in self.roots if root not in children]

    def leave(self, child: Node | Leaf) -> None:
        if isinstance(child, Node):
            self.roots.append(child)

    @staticmethod
    def real(child: Any) -> Any:
        return child.chain if isinstance(child, Node) else child

    def insert(self) -> None:
        into, child = self.node(), self.candidate()
        count = len(into.children)
        index = self.random.randint(-count - 2, count + 2)
        place = max(0, count + index) if index < 0 else min(index, count)
        call: Callable[[], object] = lambda: into.chain.insert(index, self.real(child))  # noqa: E731
        if self.random.random() < 0.4:
            place, call = count, lambda: into.chain.append(self.real(child))
        if self.attempt(call, self.refusal(into, child)):
            self.arrive(into, place, [child])

    def extend(self) -> None:
        into = self.node()
        children = [self.candidate() for _ in range(self.random.randint(0, 3))]
        errors = [self.refusal(into, child) for child in children]
        nodes = [child for child in children if isinstance(child, Node)]
        errors += [ValueError] * (len(nodes) != len(set(nodes)))
        error = fl.ChainError if any(errors) else None
        if self.attempt(lambda: into.chain.extend([self.real(child) for child in children]), error):
            self.arrive(into, len(into.children), children)

    def by_type(self) -> None:
        into, child = self.node(), self.candidate()
        kind = self.random.choice([fl.Multiply, fl.Chain, Shift, Block])
        place = next((i for i, module in enumerate(into.modules()) if isinstance(module, kind)), None)
        after = self.random.random() < 0.5
        insert = into.chain.insert_after_type if after else into.chain.insert_before_type
        error = ValueError if place is None else self.refusal(into, child)
        if self.attempt(lambda: insert(kind, self.real(child)), error) and place is not None:
            self.arrive(into, place + after, [child])

    def take(self) -> None:
        node = self.node()
        count = len(node.children)
        index = self.random.randint(-count - 1, count)
        place = index + count if index < 0 else index
        if not 0 <= place < count:
            self.attempt(lambda: node.chain.pop(index), IndexError)
            stranger = fl.Identity()
            self.attempt(lambda: node.chain.remove(stranger), ValueError)
            return
        how = self.random.randrange(4)
        if how == 0:
            node.chain.remove(node.modules()[place])
            place = node.modules().index(node.modules()[place])
        elif how == 1:
            del node.chain[node.keys[place]]
        elif how == 2:
            delattr(node.chain, node.keys[place])
        else:
            assert node.chain.pop(index) is node.modules()[place]
        child = node.children.pop(place)
        node.keys.pop(place)
        self.leave(child)

    def put(self) -> None:
        node, child = self.node(), self.candidate()
        if not node.children:
            self.attempt(lambda: node.chain.__setitem__(0, self.real(child)), IndexError)
            return
        place = self.random.randrange(len(node.children))
        old = node.children[place]
        key, new, error = node.keys[place], self.real(child), self.refusal(node, child)
        error = None if old is child else error
        how = self.random.randrange(3)
        if how == 0:
            done = self.attempt(lambda: node.chain.__setitem__(place, new), error)
        elif how == 1 and isinstance(new, nn.Module):
            done = self.attempt(lambda: setattr(node.chain, key, new), error)
        else:
            place = node.modules().index(self.real(old))
            done = self.attempt(lambda: node.chain.replace(self.real(old), new), error)
        if done and old is not child:
            node.children[place] = child
            self.roots = [root for root in self.roots if root is not child]
            self.leave(old)

    def wrap(self) -> None:
        """What an adapter does: a new chain takes the place of a child and holds it."""
        node = self.node()
        if not node.children:
            return
        place = self.random.randrange(len(node.children))
        old = node.children[place]
        if node.children.count(old) > 1 or len(self.ancestors(node)) > 8:
            return
        module = self.real(old)
        if isinstance(module, fl.ContextModule):
            with module.no_parent_refresh():
                wrapper = Node(self.random.choice(KINDS)(module))
        else:
            wrapper = Node(self.random.choice(KINDS)(module))
        wrapper.children, wrapper.keys = [old], list(wrapper.chain._modules)
        node.chain.replace(module, wrapper.chain, old_module_parent=wrapper.chain)
        node.children[place] = wrapper

    def copied(self, node: Node, chain: fl.Chain) -> Node:
        """The model of a structural copy, whose leaves with a parent link are new."""
        clone = Node(chain)
        clone.keys = list(node.keys)
        for child, module in zip(node.children, chain, strict=True):
            if isinstance(child, Node):
                assert module is not child.chain
                assert type(module) is type(child.chain)
                clone.children.append(self.copied(child, module))
            elif isinstance(child, Shift):
                assert module is not child
                assert isinstance(module, Shift)
                clone.children.append(module)
            else:
                assert module is child
                clone.children.append(child)
        return clone

    def copy(self) -> None:
        node = self.node()
        before = self.snapshot()
        self.roots.append(self.copied(node, node.chain.structural_copy()))
        assert self.snapshot()[: len(before)] == before

    def slice(self) -> None:
        node = self.node()
        ends = [self.random.choice([None, *range(-4, 5)]) for _ in range(2)]
        where = slice(*ends, self.random.choice([None, 1, 2, -1, -2]))
        part = Node(node.chain)
        part.children, part.keys = node.children[where], node.keys[where]
        self.roots.append(self.copied(part, node.chain[where]))


@pytest.mark.parametrize("seed", [0, 1, *map(exhaustive, range(2, 20))])
def test_random_changes(seed: int) -> None:
    world = World(seed)
    for _ in range(2000):
        world.step()
        world.check()
    assert world.refused > 100
