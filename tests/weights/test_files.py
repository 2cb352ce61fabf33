"""`weights.open` and `weights.save`: round trips, hostile files, crashes."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import weights
from tests.thinned import examples
from weights.disk.header import DTYPES

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, -2], dtype=torch.int8)}


def same(left: Tensor, right: Tensor) -> bool:
    """The same type, shape and bytes."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*raw)


def raw_file(path: Path, fields: Any, data: bytes = b"") -> Path:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "U8", shape: list[Any] | None = None, offsets: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": offsets or [0, 1]}


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name.isprintable() and ".." not in name and name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return tensor.mT if tensor.ndim >= 2 and draw(st.booleans()) else tensor


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(names, tensors(), max_size=5),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=4),
)
def test_what_is_saved_is_what_is_read(tmp_path: Path, content: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path = weights.save(content, tmp_path / "t.safetensors", metadata)
    written = path.read_bytes()
    opened = weights.open(path)
    assert opened.metadata == metadata
    assert set(opened) == set(content)
    with safe_open(path, framework="pt") as official:
        assert (official.metadata() or {}) == metadata
        for name, tensor in content.items():
            assert same(opened[name], tensor)
            assert same(official.get_tensor(name), tensor)
    weights.save(dict(reversed(content.items())), path, dict(reversed(metadata.items())))
    assert path.read_bytes() == written


def test_shared_and_lazy_and_graph_tensors_are_each_written_out(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    content = {
        "all": base,
        "part": base[2:5],
        "steps": base[::3],
        "wide": base[:1].expand(4),
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    opened = weights.open(weights.save(content, tmp_path / "t.safetensors"))
    assert all(torch.equal(opened[name], tensor) for name, tensor in content.items())
    opened["all"].zero_()
    assert torch.equal(opened["all"], base)


def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    script = (
        "import hashlib, pathlib, sys, torch, weights\n"
        "path = weights.save({'x': torch.ones(2), 'y': torch.zeros(3)}, sys.argv[1], dict.fromkeys('abcdefgh', ''))\n"
        "print(hashlib.sha256(path.read_bytes()).hexdigest())\n"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "t.safetensors")],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("content", "metadata", "match"),
    [
        ({"__metadata__": torch.ones(1)}, None, "__metadata__"),
        ({"": torch.ones(1)}, None, "not allowed"),
        ({"a/../b": torch.ones(1)}, None, "not allowed"),
        ({"a\0": torch.ones(1)}, None, "not allowed"),
        ({"\ud800": torch.ones(1)}, None, "not allowed"),
        ({1: torch.ones(1)}, None, "not a text"),
        ({"a": 1.0}, None, "is a float, not a tensor"),
        ({"a": torch.ones(1, device="meta")}, None, "meta"),
        ({"a": torch.eye(2).to_sparse()}, None, "sparse"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, None, "complex128"),
        ({"a": torch.ones(1)}, {"n": 1}, "texts"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(
    tmp_path: Path, content: Any, metadata: Any, match: str
) -> None:
    with pytest.raises(weights.FileFormatError, match=match):
        weights.save(content, tmp_path / "t.safetensors", metadata)
    assert list(tmp_path.iterdir()) == []


HOSTILE: Mapping[str, tuple[Any, bytes]] = {
    "duplicate tensor": (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"1"),
    "duplicate metadata key": (b'{"__metadata__":{"a":"","a":""}}', b""),
    "metadata not text": ({"__metadata__": {"a": 1}}, b""),
    "leading space": (b' {"a":' + json.dumps(entry()).encode() + b"}", b"1"),
    "unknown field": ({"a": {**entry(), "extra": 1}}, b"1"),
    "missing field": ({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "empty name": ({"": entry()}, b"1"),
    "path name": ({"../../etc/passwd": entry()}, b"1"),
    "NUL name": ({"a\0b": entry()}, b"1"),
    "huge empty": ({"a": entry(shape=[2**40, 0], offsets=[0, 0])}, b""),
    "overflowing empty": ({"a": entry(shape=[2**39, 2**39, 0], offsets=[0, 0])}, b""),
    "hundred dimensions": ({"a": entry(shape=[1] * 100)}, b"1"),
    "unknown type": ({"a": entry("F4", [2])}, b"1"),
    "type not text": ({"a": entry(dtype=["U8"])}, b"1"),  # type: ignore[arg-type]
    "boolean size": ({"a": entry(shape=[True])}, b"1"),
    "negative size": ({"a": entry(shape=[-1])}, b"1"),
    "fractional offset": ({"a": entry(offsets=[0, 1.0])}, b"1"),
    "wrong byte count": ({"a": entry(shape=[2])}, b"1"),
    "overlap": ({"a": entry(), "b": entry()}, b"1"),
    "hole": ({"a": entry(offsets=[1, 2])}, b"12"),
    "trailing bytes": ({"a": entry()}, b"12"),
    "truncated": ({"a": entry()}, b""),
    "not an object": (b"[]", b""),
    "not JSON": (b"{nonsense", b""),
    "bad UTF-8": (b'{"\xff":1}', b""),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b""),
    "endless number": (b'{"a":' + b"9" * 100_000 + b"}", b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, kind: str) -> None:
    path = raw_file(tmp_path / "t.safetensors", *HOSTILE[kind])
    with pytest.raises(weights.FileFormatError, match=r"t\.safetensors"):
        weights.open(path)


def test_a_header_larger_than_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with raw_file(tmp_path / "t.safetensors", b"{").open("r+b") as file:
        file.write((30_000_000).to_bytes(8, "little"))
        file.truncate(40_000_000)
    with pytest.raises(weights.FileFormatError, match="too large"):
        weights.open(tmp_path / "t.safetensors")


def test_booleans_other_than_zero_and_one_are_refused(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "t.safetensors", {"a": entry("BOOL")}, b"\x02")
    with pytest.raises(weights.FileFormatError, match="booleans"):
        weights.open(path)["a"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\n <html></html>", "HTML page"),
        (b"PK\x03\x04 and the rest of an archive", "zip archive"),
        (pickle.dumps({"a": [1, 2, 3]}), "pickle"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        (b"", "empty"),
        (b"\0" * 64, "something else"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(weights.FileFormatError, match=match):
        weights.open(tmp_path / "t.safetensors")


@examples(100, 300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_gets_past_the_typed_errors(tmp_path: Path, data: st.DataObject) -> None:
    path = weights.save(TENSORS, tmp_path / "t.safetensors", {"k": "v"})
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        for tensor in weights.open(path).values():
            tensor.clone()
    except weights.FileFormatError:
        pass


def test_a_file_changed_after_opening_is_noticed(tmp_path: Path) -> None:
    path = weights.save(TENSORS, tmp_path / "t.safetensors")
    opened = weights.open(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(weights.FileFormatError, match="changed since"):
        opened["a"]
    weights.save(TENSORS, path)
    with pytest.raises(weights.FileFormatError, match="changed since"):
        opened["a"]
    path.unlink()
    with pytest.raises(weights.SourceNotFoundError, match="cannot be read"):
        opened["a"]


def test_the_mapping_reads_only_what_is_asked(tmp_path: Path) -> None:
    path = weights.save(TENSORS, tmp_path / "t.safetensors")
    opened = weights.open(path)
    path.unlink()
    assert "a" in opened and "c" not in opened and len(opened) == 2
    with pytest.raises(KeyError):
        opened["c"]


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    for shard, name in (("one.safetensors", "a"), ("two.safetensors", "b")):
        weights.save({name: TENSORS[name]}, folder / shard)
    index = {"metadata": {"total_size": 26}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_sharded_folder_reads_as_one(tmp_path: Path) -> None:
    opened = weights.open(sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert opened.metadata == {"total_size": "26"}
    assert all(same(opened[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("weight_map", "error", "match"),
    [
        ({"a": "../one.safetensors"}, weights.FileFormatError, "not the name of a file beside it"),
        ({"a": "/etc/passwd.safetensors"}, weights.FileFormatError, "not the name of a file beside it"),
        ({"a": "..\\one.safetensors"}, weights.FileFormatError, "not the name of a file beside it"),
        ({"a": "config.json"}, weights.FileFormatError, "not the name of a file beside it"),
        ({"a": "one.safetensors"} | {"x": "two.safetensors"}, weights.FileFormatError, r"2 tensors \(b, x\)"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, weights.FileFormatError, "2 tensors"),
        ({"a": "none.safetensors"}, weights.SourceNotFoundError, "none"),
        (["a"], weights.FileFormatError, "not an index"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    tmp_path: Path, weight_map: Any, error: type[Exception], match: str
) -> None:
    sharded(tmp_path, weight_map)
    with pytest.raises(error, match=match):
        weights.open(tmp_path)


def test_folders_and_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(weights.SourceNotFoundError, match="holds no safetensors"):
        weights.open(tmp_path)
    weights.save(TENSORS, tmp_path / "x.safetensors")
    assert set(weights.open(tmp_path)) == {"a", "b"}
    weights.save(TENSORS, tmp_path / "y.safetensors")
    with pytest.raises(weights.FileFormatError, match=r"several .*x\.safetensors, y\.safetensors"):
        weights.open(tmp_path)
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none", "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="check the path"):
            weights.open(missing)


@pytest.mark.parametrize("step", ["fsync", "replace", "write", "check"])
def test_a_crash_while_saving_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = weights.save(TENSORS, tmp_path / "t.safetensors")
    old, tensors = path.read_bytes(), {"first": torch.ones(1), "new": torch.ones(1)}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    match step:
        case "fsync":
            monkeypatch.setattr(os, "fsync", fail)
        case "replace":
            monkeypatch.setattr(Path, "replace", fail)
        case "write":
            monkeypatch.setattr(tensors["new"], "detach", fail)
        case "check":
            monkeypatch.setattr(os, "fsync", lambda file: os.truncate(file, 9))
    expected = weights.FileFormatError if step == "check" else weights.FileWriteError
    with pytest.raises(expected, match="not a safetensors file" if step == "check" else "No space left"):
        weights.save(tensors, path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_an_interruption_while_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    tensors = {"first": torch.ones(1), "second": torch.ones(1)}
    monkeypatch.setattr(tensors["second"], "detach", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.save(tensors, tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_file_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def recorded_sync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def recorded_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    weights.save(TENSORS, tmp_path / "t.safetensors")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = weights.save(TENSORS, tmp_path / "t.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = weights.save(TENSORS, tmp_path / "real" / "t.safetensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to("real/t.safetensors")
    weights.save({"new": torch.ones(1)}, link)
    assert link.is_symlink()
    assert set(weights.open(target)) == {"new"}


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(weights.FileWriteError, match=r"file/t\.safetensors cannot be written: "):
        weights.save(TENSORS, tmp_path / "file" / "t.safetensors")
    with pytest.raises(weights.FileFormatError, match="is a folder"):
        weights.save(TENSORS, tmp_path)
