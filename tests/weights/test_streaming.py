"""Checkpoints written anew from disk to disk: what comes out, and what is left when it is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import weights
from tests.thinned import exhaustive
from tests.weights.hub_server import HubServer

TENSORS = {
    "wide": torch.arange(60.0).reshape(5, 12),
    "half": torch.arange(8.0).bfloat16(),
    "none": torch.empty(0, 3),
    "number": torch.tensor(3, dtype=torch.int64),
    "flags": torch.tensor([True, False]),
}


def doubled(tensor: Tensor) -> Tensor:
    return tensor.mul_(2)


def negative(tensor: Tensor) -> Tensor:
    return -tensor.mT.contiguous().mT


CHANGES = {"wide": negative, "half": doubled}
CHANGED = {**TENSORS, "wide": -TENSORS["wide"], "half": TENSORS["half"] * 2}


def assert_same(path: Path, expected: dict[str, Tensor]) -> None:
    found = weights.open(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in three shards, with what belongs to it and what does not."""
    folder = tmp_path / "model"
    places = {"wide": 1, "half": 2, "none": 2, "number": 3, "flags": 3}
    for number in (1, 2, 3):
        inside = {name: TENSORS[name] for name, place in places.items() if place == number}
        weights.save(inside, folder / f"model-0000{number}-of-00003.safetensors", {"format": "pt"})
    index = {
        "metadata": {"total_size": 1, "kind": "x"},
        "weight_map": {name: f"model-0000{place}-of-00003.safetensors" for name, place in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"dtype": "float32", "size": 1, "text_config": {"dtype": "float32"}})
    )
    for name in ("tokenizer.model", "code.py", "LICENSE", ".hidden.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_text(name)
    weights.save(TENSORS, folder / "checkpoint" / "model.safetensors")
    (folder / "checkpoint" / "config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_one_file(tmp_path: Path) -> None:
    source = weights.save(TENSORS, tmp_path / "a.safetensors", {"trained": "yes"})
    out = tmp_path / "new" / "b.safetensors"
    assert weights.rewrite(source, out, CHANGES) == out
    assert_same(out, CHANGED)
    assert weights.open(out).metadata == {"trained": "yes"}
    assert out.read_bytes() == weights.save(CHANGED, tmp_path / "c.safetensors", {"trained": "yes"}).read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["b.safetensors"]


def test_what_belongs_to_the_tensors_goes_too(folder: Path, tmp_path: Path) -> None:
    out = weights.rewrite(folder, tmp_path / "out", CHANGES)
    assert_same(out, CHANGED)
    left_out = {
        ".hidden.json",
        "README.md",
        "pytorch_model.bin",
        "checkpoint/model.safetensors",
        "checkpoint/config.json",
    }
    assert names(out) == names(folder) - left_out
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values()), "kind": "x"}
    assert weights.open(out / "model-00001-of-00003.safetensors").metadata == {"format": "pt"}


def test_shards_and_one_file_of_each_other(folder: Path, tmp_path: Path) -> None:
    one = weights.rewrite(folder, tmp_path / "one.safetensors", CHANGES)
    assert_same(one, CHANGED)
    many = weights.rewrite(one, tmp_path / "many", {}, max_shard_size=100)
    assert sorted(names(many)) == [
        *(f"one-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "one.safetensors.index.json",
    ]
    assert_same(many, CHANGED)
    again = weights.rewrite(many, tmp_path / "again", {}, max_shard_size=10**6)
    assert names(again) == {"one.safetensors"}
    assert_same(again, CHANGED)


def test_another_type(folder: Path, tmp_path: Path) -> None:
    out = weights.rewrite(folder, tmp_path / "out", CHANGES, dtype=torch.float16)
    assert_same(out, {name: t.half() if t.is_floating_point() else t for name, t in CHANGED.items()})
    said = json.loads((out / "config.json").read_text())
    assert said == {"dtype": "float16", "size": 1, "text_config": {"dtype": "float16"}}
    large = weights.save({"a": torch.tensor([1e5])}, tmp_path / "large.safetensors")
    with pytest.raises(weights.FileFormatError, match=r"a has numbers that are too large for torch\.float16"):
        weights.rewrite(large, tmp_path / "small.safetensors", {}, dtype=torch.float16)


def test_from_the_hub(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.add("me/model", {name: (folder / name).read_bytes() for name in names(folder)})
    out = weights.rewrite("me/model", tmp_path / "out", CHANGES)
    assert_same(out, CHANGED)
    assert {"tokenizer.model", "1_Pooling/config.json"} < names(out)


def test_a_pipeline_is_written_whole(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    for part in ("unet", "vae"):
        weights.save(TENSORS, pipe / part / "diffusion_pytorch_model.safetensors")
    (pipe / "model_index.json").write_text("{}")
    (pipe / "scheduler").mkdir()
    (pipe / "scheduler" / "scheduler_config.json").write_text("{}")
    out = weights.rewrite(pipe, tmp_path / "out", {"unet.wide": negative})
    assert names(out) == names(pipe)
    assert_same(out / "unet", {**TENSORS, "wide": CHANGED["wide"]})
    assert_same(out / "vae", TENSORS)
    (pipe / "text_encoder").mkdir()
    (pipe / "text_encoder" / "pytorch_model.bin").write_text("")
    with pytest.raises(weights.FileFormatError, match="text_encoder has its tensors in a pickle"):
        weights.rewrite(pipe, tmp_path / "another", {})


def test_what_is_there_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(weights.FileFormatError, match="is there already"):
        weights.rewrite(folder, tmp_path / "model", {})
    with pytest.raises(KeyError, match="has no tensor other"):
        weights.rewrite(folder, tmp_path / "out", {"other": negative})
    assert not (tmp_path / "out").exists()
    file = weights.save({"old": torch.ones(1)}, tmp_path / "file.safetensors")
    (tmp_path / "link.safetensors").symlink_to("file.safetensors")
    weights.rewrite(folder, tmp_path / "link.safetensors", {})
    assert (tmp_path / "link.safetensors").is_symlink()
    assert_same(file, TENSORS)


def test_permissions_follow_the_umask(folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = weights.rewrite(folder, tmp_path / "out", {})
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()} == {0o640}


def test_a_change_that_fails_can_be_made_again(folder: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def fail(tensor: Tensor) -> Tensor:
        raise KeyboardInterrupt

    def note(tensor: Tensor) -> Tensor:
        seen.append("half")
        return doubled(tensor)

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        weights.rewrite(folder, tmp_path / "out", {"wide": fail, "half": note})
    assert not (tmp_path / "out").exists()
    assert threading.active_count() == threads
    weights.rewrite(folder, tmp_path / "out", CHANGES)
    assert_same(tmp_path / "out", CHANGED)
    assert not (tmp_path / ".out.part").exists()
    with pytest.raises(ValueError, match="may not become"):
        weights.rewrite(folder, tmp_path / "two", {"wide": lambda tensor: tensor[1:]})


def test_two_at_once_do_not_write_the_same(folder: Path, tmp_path: Path) -> None:
    def again(tensor: Tensor) -> Tensor:
        with pytest.raises(weights.FileWriteError, match="is being written at the moment"):
            weights.rewrite(folder, tmp_path / "out", CHANGES)
        return negative(tensor)

    assert_same(weights.rewrite(folder, tmp_path / "out", {**CHANGES, "wide": again}), CHANGED)


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    source = weights.save({"a": torch.zeros(2), "b": torch.ones(20_000_000)}, tmp_path / "a.safetensors")

    def cut(tensor: Tensor) -> Tensor:
        os.truncate(source, 1000)
        return tensor

    with pytest.raises(weights.FileFormatError, match="has changed since it was opened"):
        weights.rewrite(source, tmp_path / "b.safetensors", {"a": cut, "b": doubled})
    assert not (tmp_path / "b.safetensors").exists()


SETUP = """
import hashlib, os, random, resource, signal, sys, time
from pathlib import Path
import torch, weights
from weights.tensors import rewrite as streaming
torch.set_num_threads(1)
folder = Path(sys.argv[1])
streaming._UNSYNCED, streaming._AT_ONCE, streaming._WAITING = 40_000, 16_384, 0
def source(seed):
    torch.default_generator.manual_seed(seed)
    return weights.save({f"{i:02}": torch.randn(5_000 + 300 * i) for i in range(40)}, folder / "source.safetensors")
reached = []
def note(done, total):
    reached.append(done)
    time.sleep(0.0005)
def run(path, key, scale, shards=None):
    reached.clear()
    changes = {f"{i:02}": lambda tensor: tensor.mul_(scale) for i in range(0, 40, 2)}
    return weights.rewrite(path, out, changes, key=key, max_shard_size=shards, progress=note)
def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else path.read_bytes()
def remove(path):
    if path.is_dir():
        for p in path.iterdir():
            p.unlink()
        path.rmdir()
    else:
        path.unlink()
"""

KILLED = """
shards = int(sys.argv[2]) or None
out = folder / ("out" if shards else "out.safetensors")
random.seed(shards or 0)
path = source(0)
start = time.perf_counter()
expected = {}
for scale in (3.0, 2.0):
    expected[scale] = contents(run(path, str(scale), scale, shards))
    remove(out)
taken = (time.perf_counter() - start) / 2
resumed = ended = other = 0
rounds = int(sys.argv[3])
for number in range(rounds):
    scale = 2.0 if number % 10 else 3.0
    child = os.fork()
    if child == 0:
        run(path, str(scale), scale, shards)
        os._exit(0)
    time.sleep(random.uniform(0.2, 1.1) * taken)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if out.exists():
        assert contents(out) == expected[scale]
        ended += 1
        remove(out)
        continue
    if number % 10 == 0:
        continue  # What comes next is another call.
    if number % 3:
        run(path, str(scale), scale, shards)
        resumed += reached[0] > 0
        assert contents(out) == expected[scale]
        assert not list(folder.glob(".*"))
        remove(out)
assert resumed > rounds // 15, resumed
print(resumed, ended)
path = source(1)
run(path, "2.0", 2.0, shards)
assert reached[0] == 0
assert contents(out) != expected[2.0]
"""

FULL = """
out = folder / "out.safetensors"
path = source(0)
expected = contents(run(path, "", 2.0))
old = weights.save({"old": torch.ones(3)}, out).read_bytes()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
try:
    run(path, "", 2.0)
except weights.FileWriteError as error:
    print(error)
else:
    raise SystemExit("it was written")
assert contents(out) == old
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
run(path, "", 2.0)
assert reached[0] >= 40_000  # What is not synced by then depends on the disk.
assert contents(out) == expected
assert not list(folder.glob(".*"))
"""

MEMORY = """
streaming._UNSYNCED, streaming._AT_ONCE, streaming._WAITING = 1 << 27, 1 << 23, 1 << 26
def status(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024
size = 40_000_000
tensors = {f"{i}": torch.full((size // 4,), float(i)) for i in range(2)}
weights.save(tensors, folder / "part.safetensors")
del tensors
path = folder / "part.safetensors"
def negate(tensor):
    return tensor.neg_()
weights.rewrite(path, folder / "first.safetensors", {})  # What is loaded when it is needed is loaded now.
many = {f"{i:02}": torch.empty(0) for i in range(9)}
source = weights.save({f"{i:02}": torch.zeros(1).expand(size // 4) for i in range(9)}, folder / "source.safetensors")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
weights.rewrite(source, folder / "out.safetensors", {name: negate for name in many})
print((status("VmHWM:") - before) / size)
"""


def run(script: str, folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script, str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rounds", [12, exhaustive(100)])
@pytest.mark.parametrize("shards", [0, 150_000])
def test_kill_9_at_any_moment_then_the_same_bytes(tmp_path: Path, shards: int, rounds: int) -> None:
    run(KILLED, tmp_path, shards, rounds)


def test_a_full_disk_leaves_the_old_file_and_can_be_gone_on_from(tmp_path: Path) -> None:
    said = run(FULL, tmp_path)
    assert "out.safetensors cannot be written: File too large; when it can be, the same call goes on" in said
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="it is read from /proc")
def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    assert float(run(MEMORY, tmp_path)) < 4.5
