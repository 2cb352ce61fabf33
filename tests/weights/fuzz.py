"""Malformed adapter files, as many as wanted: each is read, and a typed error or an adapter is all that comes of it.

`python -m tests.weights.fuzz --files 100000 --seed 0` counts what came of them. Each file depends on the seed and on
its number alone, so `--first N --files 1 --keep DIR` makes a certain one again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError
from tests.weights.corpus import corpus
from tests.weights.test_hostile_adapters import CASES, CHANGES, ENDS, MORE_SETTINGS, ODD, deep, model_of, sound
from weights import WeightsError
from weights.disk.header import DTYPES

SECONDS, BYTES = 10, 2**30
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BOMBS = ["[" * 10**5, '{"a":' * 10**4, "9" * 10**5, "-1e999", '"\\ud800"', "{", "", "nul", '[{"r":1}', "NaN", "[1,]"]
NUMBERS = [-1, 0, 1, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, True, None, "8", [], {}]
CHUNKS = [
    b"",
    b"\0",
    b"\xff" * 8,
    b'"',
    b"{",
    b"]}",
    b"9",
    b"\\",
    b"GGUF",
    b"e999",
    b"../",
    "ü".encode(),
    b"\xed\xa0\x80",
]
PLACES = [
    "../up.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "",
    "x\0y",
    "file.safetensors",
    "C:\\x.safetensors",
]
KEYS = [
    "", "..", "a/../b", "__metadata__", "x" * 10**4, "\u202e", "a.b.lora_A.weight", "unet:0:up", "unet:999999:down",
    "<s1>", "bundle_emb.x.clip_l", "lora_unet_a.alpha", "blk.0.attn_q.weight.lora_a", "lllite_x.up.0.weight",
    "base_model.vera_A", "prompt_embeddings", "/", "a/", "double_blocks.0.processor.qkv_lora1.up.weight",
    "base_model.model.a.b.base_layer.bias", "diffusion_model..lora_up.weight", "x.diff_b", "x.on_input",
]  # fmt: skip


@dataclass
class Draft:
    """A file and what is beside it, before it is made bytes."""

    file: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    config: Any
    whole: bytes
    model: Callable[[], nn.Module]


@cache
def seeds() -> list[Callable[[], Draft]]:
    """What to damage: the corpus, and a file of every method."""

    def of_method(form: str, key: str) -> Draft:
        name, tensors, config, metadata = sound(form, key)
        return Draft(
            name, dict(tensors), dict(metadata), json.loads(json.dumps(config)) or None, b"", lambda: model(key)
        )

    def of_corpus(name: str) -> Draft:
        case = corpus()[name]
        config = json.loads(json.dumps(case.config))
        return Draft(case.file, dict(case.tensors), dict(case.metadata), config, case.whole, lambda: model_for(name))

    @cache
    def model(key: str) -> nn.Module:
        return model_of(key)

    @cache
    def model_for(name: str) -> nn.Module:
        return corpus()[name].model()

    drafts = [lambda name=name: of_corpus(name) for name in corpus()]
    return drafts + [lambda form=form, key=key: of_method(form, key) for form, key in CASES]  # type: ignore[misc]


# What is done to one


def replaced(rng: random.Random, value: Any) -> Any:
    """A value of JSON with something else in some place of it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {rng.choice([*MORE_SETTINGS, *KEYS]) if k == key else k: v for k, v in value.items()}
        return {**value, key: replaced(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], replaced(rng, value[at]), *value[at + 1 :]]
    return rng.choice([*ODD, deep(1, 150)]) if rng.random() < 0.9 else deep(value, rng.randrange(1, 150))


def change_tensor(rng: random.Random, draft: Draft) -> None:
    if not draft.tensors:
        return
    key = rng.choice(sorted(draft.tensors))
    what = rng.randrange(6)
    if what == 0:
        del draft.tensors[key]
    elif what == 1:
        draft.tensors[rng.choice(KEYS)] = draft.tensors.pop(key)
    elif what == 2:
        draft.tensors[f"{key}{rng.choice(ENDS)}"] = draft.tensors[key]
    elif what == 3:
        stem = key.rpartition(".")[0] if rng.random() < 0.5 else key.partition(".")[0]
        number = rng.choice([float("nan"), float("inf"), 1e38, 0.0, -1.0, 3.0])
        alpha = torch.tensor(number, dtype=rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.complex64]))
        end = rng.choice(["alpha", "dora_scale", "reshape_weight", "on_input", "oft_R.weight", "lora_mid.weight", "x"])
        draft.tensors[f"{stem}.{end}"] = rng.choice(CHANGES)(alpha) if rng.random() < 0.3 else alpha
    else:
        draft.tensors[key] = rng.choice(CHANGES)(draft.tensors[key])


def change_metadata(rng: random.Random, draft: Draft) -> None:
    known = ["fluxion_adapter", "lora_adapter_metadata", "unet", "format", "<s1>"]
    key = rng.choice([*draft.metadata, *known])
    try:
        value = json.loads(str(draft.metadata.get(key, "{}")))
    except (ValueError, RecursionError):
        value = {}
    changed: Any = json.dumps(replaced(rng, value)) if rng.random() < 0.8 else rng.choice(BOMBS)
    draft.metadata[key] = changed if rng.random() < 0.95 else rng.choice(ODD)


def change_config(rng: random.Random, draft: Draft) -> None:
    config = draft.config if isinstance(draft.config, dict) else {}
    if rng.random() < 0.4:
        draft.config = {**config, rng.choice([*MORE_SETTINGS, "peft_type", "lora_parameters"]): rng.choice(ODD)}
    else:
        draft.config = replaced(rng, config)


def header_of(draft: Draft) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its body."""
    header: dict[str, Any] = {"__metadata__": draft.metadata} if draft.metadata else {}
    parts: list[bytes] = []
    at = 0
    for name, tensor in draft.tensors.items():
        plain = tensor.clone(memory_format=torch.contiguous_format)
        part = bytes(plain.reshape(-1).view(torch.uint8).tolist()) if plain.numel() else b""
        header[name] = {"dtype": NAMES[plain.dtype], "shape": [*plain.shape], "data_offsets": [at, at + len(part)]}
        at += len(part)
        parts.append(part)
    return header, b"".join(parts)


def change_header(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice(sorted(header)) if header else "x"
    slot = header.get(name)
    if not isinstance(slot, dict) or rng.random() < 0.2:
        header[rng.choice([name, *KEYS])] = copy.deepcopy(rng.choice([*ODD, slot]))
    elif rng.random() < 0.3:
        slot["shape"] = [rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 3, 70]))]
    elif rng.random() < 0.5:
        slot["data_offsets"] = [rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 2, 2, 3]))]
    else:
        slot[rng.choice(["dtype", "shape", "more", "data_offsets"])] = copy.deepcopy(
            rng.choice([*ODD, *NAMES.values()])
        )


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some others in some places, most in the first part."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(len(found), rng.choice([16, 500, 10**9])) or 1)
        what = rng.randrange(5)
        if what == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del found[at:]
        elif what == 2:
            found[at:at] = rng.choice(CHUNKS)
        elif what == 3:
            found[at : at + rng.choice([1, 4, 8])] = struct.pack(
                "<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1])
            )
        else:
            found[at : at + rng.choice([1, 8, 100])] = found[:8] * rng.choice([0, 1, 9])
    return bytes(found)


def write(rng: random.Random, draft: Draft, folder: Path) -> Path:
    """Damage a draft, write it, and return what to read."""
    changes: list[Callable[[random.Random, Draft], None]] = [change_tensor, change_tensor, change_metadata]
    changes += [change_config] * (3 if draft.config is not None else 1)
    level = rng.choice(["parts", "parts", "parts", "header", "bytes", "place"])
    if draft.whole:
        level = rng.choice(["bytes", "bytes", "place"])
    if level == "parts":
        for _ in range(rng.choice([1, 1, 2, 4])):
            rng.choice(changes)(rng, draft)
    header, body = header_of(draft)
    if level == "header":
        for _ in range(rng.choice([1, 1, 3])):
            change_header(rng, header)
    text = json.dumps(header).encode()
    if level == "header" and rng.random() < 0.2:
        text = rng.choice([text[:-1] + b"," + text[1:], text * 2, rng.choice(BOMBS).encode()])
    content = draft.whole or len(text).to_bytes(8, "little") + text + body
    config = b"" if draft.config is None else json.dumps(draft.config).encode()
    if level == "bytes" and config and rng.random() < 0.4:
        config = rng.choice([damaged(rng, config), rng.choice(BOMBS).encode()])
    elif level == "bytes":
        content = damaged(rng, content)
    path = folder / draft.file
    path.write_bytes(content)
    if config:
        (folder / "adapter_config.json").write_bytes(config)
    if level == "place":
        misplace(rng, folder, path)
    return rng.choice([path, path, folder])


def misplace(rng: random.Random, folder: Path, path: Path) -> None:
    """Put something else where the file was, or beside it."""
    victim = rng.choice(sorted(folder.iterdir()))
    what = rng.randrange(6)
    if what == 0:
        victim.unlink()
        victim.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", victim.name, "..", "/proc/self/mem", "missing"]))
    elif what == 1:
        victim.write_bytes(b"")
    elif what == 2:
        victim.unlink()
        victim.mkdir()
    elif what == 3:
        path.rename(folder / rng.choice(["adapter_model.safetensors", "adapters.safetensors", "x.gguf", "x.bin", "x"]))
        path.write_bytes(rng.choice([b"", b"GGUF", b"<html>", b"PK\3\4", b"\x80\x02", b"version https://git-lfs"]))
    elif what == 4:
        beside = rng.choice(["adapter.safetensors", "pytorch_lora_weights.safetensors", "b.gguf"])
        (folder / beside).write_bytes(path.read_bytes())
    else:
        names: dict[Any, Any] = {rng.choice(KEYS): rng.choice(PLACES) for _ in range(rng.randrange(3))}
        index = {"metadata": rng.choice([{}, None, {"a": 1}]), "weight_map": rng.choice([names, rng.choice(ODD)])}
        (folder / "model.safetensors.index.json").write_text(json.dumps(replaced(rng, index)))


# What comes of it


def outcome(draft: Draft, path: Path) -> str:
    """Read a file, and load it where that is possible: what became of it."""
    if path.is_dir() and any(path.glob("*.index.json")):
        with contextlib.suppress(WeightsError):
            dict(weights.open(path))
    try:
        weights.read_adapter(path)
    except WeightsError as error:
        return type(error).__name__
    model = draft.model()
    try:
        patch = adapters.load(model, path)
    except (AdapterError, WeightsError) as error:
        return f"read, {type(error).__name__}"
    patch.eject()
    return "read and loaded"


def run(
    files: int, seed: int = 0, first: int = 0, keep: Path | None = None
) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Read so many files: the counts of what came of them, and the numbers and traces of those that went wrong.

    The memory of the process is bounded from here on, and each file has a limited time.
    """
    seeds()
    for kind, key in CASES:
        sound(kind, key)
    counts: Counter[str] = Counter()
    faults: list[tuple[int, str]] = []
    with bounded():
        for number in range(first, first + files):
            rng = random.Random(f"{seed}:{number}")
            draft = rng.choice(seeds())()
            with temporary(keep) as folder:
                path = write(rng, draft, folder)
                signal.alarm(SECONDS)
                try:
                    found = outcome(draft, path)
                except Exception as error:
                    found = f"FAULT {type(error).__name__}"
                    faults.append((number, traceback.format_exc()))
                finally:
                    signal.alarm(0)
            counts[found] += 1
    return counts, faults


@contextlib.contextmanager
def temporary(keep: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=keep or shared_memory()))
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder)


def shared_memory() -> str | None:
    """A folder that is in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more memory than a gibibyte besides what there is, and an error at each alarm."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"It took more than {SECONDS} s.")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, old = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first file")
    parser.add_argument("--keep", type=Path, help="a folder to leave the files in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, faults = run(args.files, args.seed, args.first, args.keep)
    for number, trace in faults[:10]:
        print(f"{number}:\n{trace}")
    for what, count in counts.most_common():
        print(f"{count:8,} {what}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
