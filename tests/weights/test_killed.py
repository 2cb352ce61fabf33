"""Writing that is cut off: by kill -9 at any moment, or by a disk that takes no more. What was there stays whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SETUP = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch, weights
torch.set_num_threads(1)
folder = Path(sys.argv[1])
def adapter(value):
    tensors = {"lora_A": torch.full((8, 20_000), value), "lora_B": torch.full((20_000, 8), value)}
    return weights.AdapterFile({"fc": weights.LayerWeights("lora", {"rank": 8, "alpha": value}, tensors)})
def contents():
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
versions = []
for value in (1.0, 2.0):
    weights.write_adapter(adapter(value), folder)
    versions.append(contents())
"""

KILLED = """
seen, cut_off = set(), 0
random.seed(0)
start = time.perf_counter()
weights.write_adapter(adapter(1.0), folder)
taken = time.perf_counter() - start
for number in range(400):
    if number >= 40 and len(seen) == 2 and cut_off:
        break
    child = os.fork()
    if child == 0:
        while True:
            for value in (1.0, 2.0):
                weights.write_adapter(adapter(value), folder)
    time.sleep(random.uniform(0.0, 4 * taken))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    now = contents()
    for name, content in now.items():
        assert content in [version[name] for version in versions], name
    seen.add(now["adapter_model.safetensors"])
    assert now.keys() == versions[0].keys()
    cut_off += any(path.name.endswith(".tmp") for path in folder.iterdir())
assert cut_off
assert len(seen) == 2
"""

FULL = """
before = contents()
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for value in (1.0, 2.0):
    try:
        weights.write_adapter(adapter(value), folder)
    except weights.FileWriteError as error:
        print(error)
    else:
        raise SystemExit("it was written")
assert contents() == before
assert not any(path.name.startswith(".") for path in folder.iterdir())
"""


def run(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_leaves_each_file_old_or_new(tmp_path: Path) -> None:
    run(KILLED, tmp_path)


def test_a_full_disk_leaves_the_old_files(tmp_path: Path) -> None:
    assert "adapter_model.safetensors cannot be written: File too large" in run(FULL, tmp_path)
