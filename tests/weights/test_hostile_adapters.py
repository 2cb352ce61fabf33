"""Adapter files that are broken or hostile: a typed error or a patch that works, no hang, no memory, no trace."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapters
import weights
from adapters import AdapterError, Method
from adapters.methods import METHODS
from tests.adapters.models import perturb, snapshot
from tests.thinned import examples, one_in
from weights import WeightsError
from weights.methods.core.patterns import PatternTable, are_quick, compiled

SECONDS, BYTES = 20, 2**30


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.block = nn.ModuleDict({"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": nn.Linear(8, 8)})
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.emb(x).mT.unsqueeze(-1)).squeeze(-1).mT)
        return self.fc(self.block["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"](x))


def llama() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))


NUMBERS: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 4},
    "c3a": {"block_size": 4},
    "copy": {},
    "diag-oft": {"block_size": 4},
    "fourierft": {"n_frequency": 5},
    "ia3": {"feedforward": True},
    "oft": {"block_size": 4},
    "output-boft": {"block_size": 4},
    "prefix_tuning": {"num_virtual_tokens": 2},
    "prompt_tuning": {"num_virtual_tokens": 2},
    "road": {"group_size": 4},
    "trainable_tokens": {"tokens": (1, 3)},
    "vblora": {"vector_length": 4, "num_vectors": 6},
}
TARGETS: dict[str, Any] = {"bottleneck": "fc", "copy": "fc", "trainable_tokens": "emb"}
LLAMA = {"prefix_tuning", "prompt_tuning"}
CASES = [(form, key) for key in sorted(METHODS) for form in ("fluxion", "peft", "lycoris")]
CASES = [(form, key) for form, key in CASES if form in weights.formats_of(key) and key not in ("bitfit",)]


def method_of(key: str) -> Method:
    kind = METHODS[key]
    rank = {"rank": 2} if "rank" in kind.__dataclass_fields__ else {}
    return kind(**{**rank, **NUMBERS.get(key, {})})


def model_of(key: str) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return llama().eval() if key in LLAMA else Net().eval()


@cache
def sound(form: str, key: str) -> tuple[str, dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """A sound file: its name, its tensors, the settings beside them, and its metadata."""
    model = model_of(key)
    exclude = ["emb"] if form == "lycoris" else []
    patch = adapters.inject(model, method_of(key), TARGETS.get(key), [name for name in exclude if key != "full"])
    perturb(patch)
    with tempfile.TemporaryDirectory() as folder:
        name = {"peft": "adapter_model.safetensors"}.get(form, "adapter.safetensors")
        patch.save_pretrained(Path(folder) if form == "peft" else Path(folder, name), format=form)
        file = weights.open(Path(folder, name))
        config = json.loads(Path(folder, "adapter_config.json").read_text()) if form == "peft" else {}
        return name, dict(file), config, file.metadata


# What is done to it

PATTERNS = [
    "(a+)+$",
    "(a|a)*b",
    "(a?){40}a{40}",
    "(.*.*.*.*.*.*)*x",
    "(?:a|aa)" * 30 + "x",
    "a?" * 30 + "b",
    "(",
    "[",
    "(" * 5000,
]
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**5, 10**9, 2**31, 2**62, 2**63, 10**18, 10**30, -(10**30), 10**400, 0.5, -0.0,
    1e308, float("nan"), float("inf"), "", "none", "all", "fc", "\0", "ü" * 50, [], [0], [-1], [1, 1], [10**18], ["fc"],
    [None], {}, {"fc": 10**9}, {"fc": "x"}, {"": 1}, {"fc": [1]}, {"fc": {}}, [[]], [{}], [10**18, 2], [4, 2],
    *PATTERNS, *({pattern: 2} for pattern in PATTERNS), [PATTERNS[0]],
]  # fmt: skip
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint64, torch.bfloat16]
CHANGES: list[Callable[[Tensor], Tensor]] = [
    *(lambda t, dtype=dtype: t.to(torch.float32).to(dtype) for dtype in DTYPES),
    lambda t: torch.zeros((), dtype=t.dtype),
    lambda t: torch.zeros(0, dtype=t.dtype),
    lambda t: torch.zeros(*t.shape[:-1], 0, dtype=t.dtype),
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1),
    lambda t: t.transpose(0, -1) if t.ndim else t,
    lambda t: torch.cat([t, t]) if t.ndim else t,
    lambda t: t[:1] if t.ndim else t,
    lambda t: t.expand(2, *t.shape),
    lambda t: torch.full_like(t, 100 if not t.is_floating_point() else torch.nan),
    lambda t: torch.full_like(t, -1) if t.dtype.is_signed else t,
    lambda t: torch.zeros(1, 1, *[1] * 30, dtype=t.dtype),
    lambda t: torch.zeros(1, 1000, dtype=t.dtype),
    lambda t: torch.zeros(1000, 1, 1, dtype=t.dtype),
]
ENDS = ["", ".weight", ".bias", ".alpha", ".x", ".lora_A.weight", ".lora_mid.weight", ".dora_scale", ".rescale"]


@st.composite
def broken(draw: st.DrawFn, form: str, key: str) -> tuple[str, dict[str, Tensor], Any, dict[str, str]]:
    name, tensors, config, metadata = sound(form, key)
    tensors, config, metadata = dict(tensors), dict(config), dict(metadata)
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["tensor", "drop", "rename", "more", *["setting"] * (4 * (form != "lycoris"))]))
        at = draw(st.sampled_from(sorted(tensors))) if tensors else ""
        if what == "setting" and form == "peft":
            names = sorted({*config, *MORE_SETTINGS})
            config[draw(st.sampled_from(names))] = draw(VALUES)
        elif what == "setting":
            metadata["fluxion_adapter"] = draw(described(metadata["fluxion_adapter"]))
        elif at and what == "more":
            end = draw(st.sampled_from(ENDS))
            tensors[f"{at.partition('.')[0]}{end}" if form == "lycoris" else f"{at}{end}"] = torch.ones(3, 2)
        elif at and what == "tensor":
            tensors[at] = draw(st.sampled_from(CHANGES))(tensors[at])
        elif at and what == "rename":
            tensors[f"{at}{draw(st.sampled_from(['x', '.weight', '/']))}"] = tensors.pop(at)
        elif at:
            del tensors[at]
    return name, tensors, config, metadata


MORE_SETTINGS = {
    "alpha_pattern", "bias", "fan_in_fan_out", "feedforward_modules", "init_lora_weights", "lora_bias", "mini_r",
    "modules_to_save", "r", "rank_pattern", "save_only_topk_weights", "sparse", "trainable_token_indices", "use_dora",
    "use_rslora", "very_sparse",
}  # fmt: skip


@st.composite
def described(draw: st.DrawFn, text: str) -> str:
    """The description in a file of our own, with something else in it."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(["", "{", "[]", "[" * 3000, "null", '{"version":1}', json.dumps(deep(1, 500))]))
    try:
        about = json.loads(text)
        layer = draw(st.sampled_from(sorted(about["layers"])))
        place = draw(st.sampled_from([about, about["layers"], about["layers"][layer]]))
        numbers = about["layers"][layer]["hyperparameters"]
        place = draw(st.sampled_from([place, numbers, numbers, numbers]))
        place[draw(st.sampled_from(sorted({*place, "rank"})))] = draw(VALUES | st.just(deep(1, 300)))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return text
    return json.dumps(about)


# What may come of it


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises where the block takes too long, or more memory than anything here needs."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"It took more than {SECONDS} s.")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def attempt(model: nn.Module, path: Path) -> None:
    """Read and load it: what comes out is a typed error, or a patch that runs and leaves no trace."""
    before = snapshot(model)
    with bounded():
        with contextlib.suppress(WeightsError):
            weights.read_adapter(path)
        try:
            patch = adapters.load(model, path)
        except (AdapterError, WeightsError):
            pass
        else:
            with torch.no_grad():
                model(torch.arange(8).view(2, 4))
            patch.eject()
    assert snapshot(model) == before


def store(
    folder: Path, form: str, name: str, tensors: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]
) -> None:
    """Write what `sound` gives, or what has become of it."""
    weights.save(tensors, folder / name, metadata)
    if form == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("form", "key"), CASES)
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_typed_error_or_a_patch_that_runs(form: str, key: str, data: st.DataObject) -> None:
    name, tensors, config, metadata = data.draw(broken(form, key))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        store(path, form, name, tensors, config, metadata)
        attempt(model_of(key), path / name)


@pytest.mark.parametrize(("form", "key"), one_in(2, CASES, key=lambda case: case[1]))
@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bytes(form: str, key: str, data: st.DataObject) -> None:
    name, tensors, config, metadata = sound(form, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        store(path, form, name, tensors, config, metadata)
        victim = path / data.draw(st.sampled_from(sorted(file.name for file in path.iterdir())))
        content = bytearray(victim.read_bytes())
        at = data.draw(st.integers(0, min(len(content) - 1, 4000)))
        damage = data.draw(st.sampled_from(["byte", "cut", "hole", "more"]))
        if damage == "byte":
            content[at] = data.draw(st.integers(0, 255))
        else:
            end = {"cut": len(content), "hole": at + 3, "more": at}[damage]
            content[at:end] = data.draw(st.sampled_from([b"", b'"', b"9", b"\xff\xff", b"]]}"]))
        victim.write_bytes(content)
        attempt(model_of(key), path / name)


@pytest.mark.parametrize(("form", "key"), one_in(2, CASES, key=lambda case: case[1]))
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_no_file_can_hold_is_not_written(form: str, key: str, data: st.DataObject) -> None:
    """Neither is anything written that cannot be read again."""
    name, tensors, config, metadata = sound(form, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        store(path, form, name, tensors, config, metadata)
        file = weights.read_adapter(path / name)
        where = data.draw(st.sampled_from(sorted(file.layers)))
        layer = file.layers[where]
        given, numbers = dict(layer.tensors), dict(layer.hyperparameters)
        at = data.draw(st.sampled_from(sorted(given)))
        what = data.draw(st.sampled_from(["tensor", "drop", "rename", "number", "number", "forget", "path", "shared"]))
        if what == "tensor":
            given[at] = data.draw(st.sampled_from(CHANGES))(given[at])
        elif what in ("drop", "rename"):
            tensor = given.pop(at)
            given |= {f"{at}x": tensor} if what == "rename" else {}
        elif what in ("number", "forget") and numbers:
            number = data.draw(st.sampled_from(sorted(numbers)))
            numbers.pop(number)
            numbers |= {number: data.draw(VALUES)} if what == "number" else {}
        layers = {**file.layers, where: replace(layer, tensors=given, hyperparameters=numbers)}
        if what == "path":
            layers[data.draw(st.sampled_from(["", "x", "..", "a/b", f"{where}.weight"]))] = layers.pop(where)
        if what == "shared":
            file = replace(file, shared={**file.shared, "bank": torch.ones(2)})
        target = path / "written" if form != "lycoris" else path / "written.safetensors"
        with bounded(), contextlib.suppress(WeightsError):
            weights.write_adapter(replace(file, layers=layers), target, format=form)
        with contextlib.suppress(WeightsError):
            weights.read_adapter(target)


# What would need far more memory than the file: refused by what the tensors are

HUGE = 10**9


@pytest.mark.parametrize(
    ("key", "numbers"),
    [
        ("lora", {"rank": HUGE}),
        ("dora", {"rank": HUGE}),
        ("adalora", {"rank": HUGE, "kept": HUGE}),
        ("vera", {"rank": HUGE}),
        ("randlora", {"rank": HUGE}),
        ("hra", {"rank": HUGE}),
        ("loha", {"rank": HUGE}),
        ("gralora", {"hybrid_rank": HUGE}),
        ("boft", {"factors": HUGE}),
        ("fourierft", {"n_frequency": HUGE}),
        ("vblora", {"num_vectors": HUGE}),
        ("vblora", {"num_vectors": HUGE, "only_topk": True}),
        ("bottleneck", {"size": HUGE}),
        ("lora", {"rank": 2**62}),
        ("lora", {"rank": 10**30}),
        ("prefix_tuning", {"num_virtual_tokens": HUGE}),
        ("prefix_tuning", {"projection": 2}),
    ],
)
def test_numbers_that_are_not_those_of_the_tensors(key: str, numbers: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(key)
    patch = adapters.inject(model, method_of(key), TARGETS.get(key))
    file = patch.adapter_file()
    patch.eject()
    tensors: dict[str, Tensor] = {}
    if "only_topk" in numbers:
        tensors = {f"vblora_logits_{factor}_topk_weights": torch.zeros(2, 2, 1) for factor in "AB"}
        tensors |= {f"vblora_logits_{factor}_topk_indices": torch.zeros(2, 2, 2, dtype=torch.int32) for factor in "AB"}
    layers = {
        path: replace(layer, hyperparameters={**layer.hyperparameters, **numbers}, tensors=tensors or layer.tensors)
        for path, layer in file.layers.items()
        if not tensors or path == "fc"
    }
    weights.write_adapter(replace(file, layers=layers), tmp_path / "huge", format="fluxion")
    before = snapshot(model)
    with bounded(), pytest.raises(AdapterError, match=r"does not fit|for another model|needs"):
        adapters.load(model, tmp_path / "huge")
    assert snapshot(model) == before


def test_a_core_out_of_all_proportion(tmp_path: Path) -> None:
    tensors = {"lora_up.weight": torch.ones(8, 1), "lora_down.weight": torch.ones(1, 10**6)}
    tensors["lora_mid.weight"] = torch.ones(1, 1, 10**5)
    path = weights.save({f"lycoris_fc.{end}": t for end, t in tensors.items()}, tmp_path / "file.safetensors")
    with bounded(), pytest.raises(weights.FileFormatError, match=r"a lora_mid \(1, 1, 100000\) that does not fit"):
        weights.read_adapter(path)


# Values of the wrong kind


@pytest.mark.parametrize(
    ("key", "name", "value", "match"),
    [
        ("lora", "lora_A", torch.ones(2, 8, dtype=torch.complex64), r"lora_A is \(2, 8\) of complex64 in the file"),
        ("lora", "lora_A", torch.ones(2, 8, dtype=torch.int64), r"lora_A is \(2, 8\) of int64 in the file"),
        ("shira", "shira_indices", torch.full((2, 32), 8), r"shira_indices has positions outside of \(8, 8\)"),
        ("shira", "shira_indices", torch.full((2, 32), -1), r"shira_indices has positions outside of \(8, 8\)"),
        ("shira", "shira_indices", torch.ones(2, 32), r"shira_indices is \(2, 32\) in the file"),
    ],
)
def test_tensors_that_would_be_read_as_something_else(
    key: str, name: str, value: Tensor, match: str, tmp_path: Path
) -> None:
    model = model_of(key)
    patch = adapters.inject(model, method_of(key), "fc")
    path = patch.save_pretrained(tmp_path / "file.safetensors", format="fluxion")
    patch.eject()
    file = weights.open(path)
    weights.save({**file, f"fc/{name}": value}, path, file.metadata)
    with pytest.raises(adapters.LayerMismatchError, match=match):
        adapters.load(model, path)


@pytest.mark.parametrize("index", [-1, 6])
def test_vectors_that_are_not_in_the_bank(index: int, tmp_path: Path) -> None:
    layer = {f"vblora_logits_{factor}_topk_weights": torch.zeros(2, 2, 1) for factor in "AB"}
    layer |= {f"vblora_logits_{factor}_topk_indices": torch.full((2, 2, 2), index) for factor in "AB"}
    numbers = {"rank": 2, "num_vectors": 6, "vector_length": 4, "topk": 2, "only_topk": True}
    file = weights.AdapterFile(
        {"fc": weights.LayerWeights("vblora", numbers, layer)}, shared={"vblora_vector_bank": torch.ones(6, 4)}
    )
    weights.write_adapter(file, tmp_path, format="fluxion")
    with pytest.raises(adapters.LayerMismatchError, match=f"topk_indices has indices from {index} to {index}, for 6"):
        adapters.load(model_of("vblora"), tmp_path)


# Patterns

PATHS = [f"model.layers.{number}.self_attn.{name}_proj" for number in range(80) for name in "qkvo"]


@pytest.mark.parametrize(
    "pattern",
    [
        r"q_proj",
        r"^model\.layers\.3\.self_attn\.q_proj",
        r"(?<=^model\.layers\.0\.self_attn\.)q_proj",
        r".*\.(q|k|v)_proj",
        r"model\.layers\.(\d+)\.self_attn\.[qk]_proj",
        r".*layers\.(?:[0-9]|1[0-9])\..*attn.*",
        r"(?:model\.)?layers\.\d{1,2}\.(?P<part>.*)_proj",
        "|".join(map(re.escape, PATHS)),
    ],
)
def test_patterns_that_people_write_are_quick(pattern: str) -> None:
    assert are_quick([pattern], PATHS)


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern[-1] not in "(["])
def test_patterns_that_take_forever_are_not(pattern: str) -> None:
    assert not are_quick([pattern], ["a" * 40])


@examples(60, 200)
@given(st.text("aab.*+?|()[]{},1\\d", max_size=24))
def test_what_is_taken_for_quick_is_quick(pattern: str) -> None:
    try:
        found = compiled(pattern)
    except ValueError:
        return
    if are_quick([pattern], ["a" * 40] * 1000):
        with bounded():
            for _ in range(10):
                found.match("a" * 40)
                PatternTable({f"{pattern}x": 1}).get("a" * 40, 0)
