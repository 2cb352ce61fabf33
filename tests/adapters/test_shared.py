"""Tensors that all layers of a patch have in common: one of each, wherever the model goes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError, LayerMismatchError, Method, Patch, RandLoRA, VBLoRA, VeRA
from tests.adapters.models import perturb

METHODS: dict[str, Method] = {
    "vera": VeRA(rank=3),
    "randlora": RandLoRA(rank=3, alpha=20),
    "vblora": VBLoRA(rank=3, num_vectors=6, vector_length=2),
}
CONSTANT = {"vera": {"vera_A", "vera_B"}, "randlora": {"randlora_A", "randlora_B"}, "vblora": set()}
TRAINED = {"vera": set(), "randlora": set(), "vblora": {"vblora_vector_bank"}}


class Net(nn.Module):
    """Layers of different sizes; the last one has the weight of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 4)
        self.square = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.square.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.wide, self.narrow, self.square, self.tied):
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(params=METHODS)
def key(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model() -> Net:
    return Net().double()


@pytest.fixture
def patch(model: Net, key: str) -> Patch:
    patch = adapters.inject(model, METHODS[key])
    perturb(patch)
    return patch


def common(patch: Patch, key: str) -> dict[str, Tensor]:
    """The shared tensors, checked to be one object in all branches."""
    branches = [place.branch for place in patch.attachments]
    found = {name: branches[0]._parameters[name] for name in CONSTANT[key] | TRAINED[key]}
    assert len(branches) == 5 and found
    for branch in branches:
        assert branch.common == found.keys() and branch.constants == CONSTANT[key]
        assert all(branch._parameters[name] is tensor for name, tensor in found.items())
    return found


def test_one_object_for_all_layers_wherever_the_model_goes(model: Net, patch: Patch, key: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    before = common(patch, key)
    for dtype in (torch.float16, torch.float32, torch.float64):
        model.to(dtype)
        assert all(tensor.dtype == dtype for tensor in common(patch, key).values())
        assert {name: id(tensor) for name, tensor in common(patch, key).items()} == {
            n: id(t) for n, t in before.items()
        }
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)
    patch.eject()
    patch.inject()
    assert common(patch, key) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_among_itself(model: Net, patch: Patch, key: str, copied: object) -> None:
    twin = copied(model)
    (other,) = adapters.patches(twin).values()
    for name, tensor in common(other, key).items():
        assert tensor is not common(patch, key)[name] and torch.equal(tensor, common(patch, key)[name])
        assert tensor.requires_grad == (name in TRAINED[key])
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(twin(x), model(x))
    assert common(patch, key)


def test_memory_does_not_grow_with_the_layers(key: str) -> None:
    sizes = []
    for count in (2, 20):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(count)))
        patch = adapters.inject(model, METHODS[key])
        model.double()
        tensors = [
            t
            for place in patch.attachments
            for name, t in place.branch.tensors().items()
            if name in place.branch.common
        ]
        sizes.append(sum({t.data_ptr(): t.nbytes for t in tensors}.values()))
        assert len(tensors) == count * len({id(t) for t in tensors})
    assert sizes[0] == sizes[1]


def test_only_what_is_trained_is_counted_and_what_is_shared_once(patch: Patch, key: str) -> None:
    shapes = ((8, 6), (12, 8), (4, 12), (4, 4))
    own = {
        "vera": sum(outputs + 3 for outputs, _ in shapes),
        "randlora": sum(-(-min(shape) // 3) * (3 + min(shape)) for shape in shapes),
        "vblora": sum(3 * (outputs // 2 + inputs // 2) * 6 for outputs, inputs in shapes),
    }[key]
    bank = {"vblora": 6 * 2}.get(key, 0)
    assert patch.num_parameters() == own + bank
    assert not {name.rpartition(".")[2] for name, _ in patch.named_parameters()} & CONSTANT[key]
    grouped = (parameter for group in patch.parameter_groups(1e-3) for parameter in group["params"])
    for listed in (patch.parameters(), grouped):
        identities = [id(parameter) for parameter in listed]
        assert len(identities) == len(set(identities)) == len(list(patch.parameters()))
    lines = str(patch).splitlines()
    assert lines[-1] == f"  5 layers, {own + bank:,} parameters"
    rows = [line.split() for line in lines[2:-1]]
    assert sum(int(row[-1]) for row in rows if row[0] != "tied") == own + bank
    assert [row[3] for row in rows if row[:3] == ["all", "of", "these"]] == sorted(TRAINED[key])


def test_states_have_it_once(model: Net, patch: Patch, key: str) -> None:
    state = patch.state_dict()
    for name in CONSTANT[key] | TRAINED[key]:
        assert [path for path in state if path.endswith(f".{name}")] == [f"first.{name}"]
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    state, whole = copy.deepcopy(state), copy.deepcopy(model.state_dict())
    patch.eject()
    for load in (lambda other: other.load_state_dict(state), lambda _: model.load_state_dict(whole)):
        other = adapters.inject(model, METHODS[key])
        perturb(other, seed=5)
        with torch.no_grad():
            for tensor in common(other, key).values():
                tensor.zero_()
        assert not torch.equal(model(x), expected)
        load(other)
        assert torch.equal(model(x), expected)
        common(other, key)
        other.eject()


def test_constants_are_never_trained(model: Net, patch: Patch, key: str, tmp_path: Path) -> None:
    def flags(patch: Patch) -> dict[str, bool]:
        return {name: tensor.requires_grad for name, tensor in common(patch, key).items()}

    ours = {name: name in TRAINED[key] for name in common(patch, key)}
    assert flags(patch) == ours
    assert not any(parameter.requires_grad for parameter in (model.first.base.weight, model.square.base.bias))
    patch.save_pretrained(tmp_path / "adapter")
    patch.eject()
    assert flags(patch) == ours and all(parameter.requires_grad for parameter in model.parameters())
    loaded = adapters.load(model, tmp_path / "adapter", trainable=True)
    assert flags(loaded) == ours
    model(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    for name, tensor in common(loaded, key).items():
        assert (tensor.grad is not None) == (name in TRAINED[key])
    loaded.eject()
    frozen = adapters.load(model, tmp_path / "adapter")
    assert not any(tensor.requires_grad for tensor in common(frozen, key).values())


def test_files_have_it_once(model: Net, patch: Patch, key: str, tmp_path: Path) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    patch.save_pretrained(tmp_path / "adapter")
    names = list(weights.open(tmp_path / "adapter" / "adapter_model.safetensors"))
    for name in CONSTANT[key] | TRAINED[key]:
        assert [path for path in names if path.endswith(name)] == [f"base_model.{name}"]
    patch.eject()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(77)
        loaded = adapters.load(model, tmp_path / "adapter")
    assert torch.equal(model(x), expected)
    for name, tensor in common(loaded, key).items():
        assert torch.equal(tensor, common(patch, key)[name])


def test_a_file_without_it_is_refused_unless_it_comes_from_the_seed(
    model: Net, patch: Patch, key: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x)
    file = patch.adapter_file()
    bare = weights.AdapterFile(file.layers)
    patch.eject()
    if TRAINED[key]:
        with pytest.raises(weights.FileFormatError, match=r"base_model\.vblora_vector_bank' is missing"):
            weights.write_adapter(bare, tmp_path / "bare")
        return
    weights.write_adapter(bare, tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "adapter_config.json").read_text())
    assert config["save_projection"] is False
    loaded = adapters.load(model, tmp_path / "bare")
    assert torch.equal(model(x), expected)
    loaded.eject()
    # What a seed gives depends on the largest layer.
    smaller = nn.ModuleDict({"first": nn.Linear(6, 8)})
    with pytest.raises(
        LayerMismatchError, match=r"is not in the file, and depends on the layers that are not in the mod"
    ):
        adapters.load(smaller, tmp_path / "bare", strict=False)
    # A file that says that it has them, and has not, was cut short.
    (tmp_path / "bare" / "adapter_config.json").write_text(json.dumps({**config, "save_projection": True}))
    with pytest.raises(weights.FileFormatError, match=r"the tensor 'base_model\.\w+_A' is missing"):
        adapters.load(model, tmp_path / "bare")
    (tmp_path / "bare" / "adapter_config.json").write_text(json.dumps({**config, "save_projection": "no"}))
    with pytest.raises(weights.FileFormatError, match="save_projection is not true or false"):
        adapters.load(model, tmp_path / "bare")


def test_other_values_than_those_of_the_seed_are_read_from_the_file(
    model: Net, patch: Patch, key: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for tensor in common(patch, key).values():
            tensor.normal_()
    expected = model(x)
    patch.save_pretrained(tmp_path / "adapter")
    patch.eject()
    adapters.load(model, tmp_path / "adapter")
    assert torch.equal(model(x), expected)


def test_a_tensor_of_another_size_is_refused(patch: Patch, key: str, tmp_path: Path) -> None:
    file = patch.adapter_file()
    cut = {name: tensor[:-1] for name, tensor in file.shared.items()}
    weights.write_adapter(weights.AdapterFile(file.layers, shared=cut), tmp_path / "cut")
    with pytest.raises(LayerMismatchError, match=r"(_A|_bank) is \(\d+, .*\) in the file, \(\d+, .*\) in the model"):
        adapters.load(Net(), tmp_path / "cut")


def test_layers_in_several_dtypes_share_it(key: str) -> None:
    model = Net().double()
    model.wide.to(torch.bfloat16)
    hook = model.wide.register_forward_pre_hook(lambda _, args: args[0].bfloat16())
    back = model.wide.register_forward_hook(lambda _, args, output: output.double())
    patch = adapters.inject(model, METHODS[key], exclude="tied")
    perturb(patch)
    x = torch.randn(3, 6, dtype=torch.float64)
    wide = model.wide.branches[0]
    assert wide.dtype == torch.bfloat16 and {t.dtype for t in wide.values().values()} == {torch.bfloat16}
    expected = model(x)
    expected.sum().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in patch.parameters())
    with torch.no_grad():
        patch.merge()
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    hook.remove()
    back.remove()


def test_patches_share_nothing_with_each_other(model: Net, patch: Patch, key: str) -> None:
    other = adapters.inject(model, METHODS[key], name="other")
    assert not {id(t) for t in common(patch, key).values()} & {id(t) for t in common(other, key).values()}


def test_each_set_of_hyperparameters_has_its_own(key: str, tmp_path: Path) -> None:
    other = {"vera": VeRA(rank=5), "randlora": RandLoRA(rank=2), "vblora": VBLoRA(num_vectors=9, vector_length=1)}[key]
    model = Net().double()
    patch = adapters.inject(model, {"first": METHODS[key], "wide": METHODS[key], "narrow": other})
    first, wide, narrow = (place.branch for place in patch.attachments)
    for name in first.common:
        assert getattr(first, name) is getattr(wide, name) is not getattr(narrow, name)
        assert getattr(first, name).shape != getattr(narrow, name).shape
    perturb(patch)
    expected = model(x := torch.randn(3, 6, dtype=torch.float64))
    state = copy.deepcopy(patch.state_dict())
    perturb(patch, seed=4)
    patch.load_state_dict(state)
    assert torch.equal(model(x), expected)
    with pytest.raises(AdapterError, match=r"do not all share the same .*, and a file has one"):
        patch.save_pretrained(tmp_path / "adapter")


def test_a_step_of_training_reaches_all_layers(model: Net, patch: Patch, key: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(patch.parameters(), lr=1e-4)
    constants = {name: tensor.clone() for name, tensor in common(patch, key).items() if name in CONSTANT[key]}
    before = model(x).square().sum()
    before.backward()
    optimizer.step()
    assert model(x).square().sum() < before
    assert all(torch.equal(common(patch, key)[name], tensor) for name, tensor in constants.items())
