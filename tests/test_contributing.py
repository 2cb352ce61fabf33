"""The page for contributors: each of its diffs adds one thing by one file, and that works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)

METHOD = """
import sys, torch
from torch import nn
import adapters

model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
patch = adapters.inject(model, adapters.Gain(), name="loud")
with torch.no_grad():
    next(patch.parameters()).fill_(2.0)
expected = model(x)
for format in ("fluxion", "peft"):
    patch.save_pretrained(f"{sys.argv[1]}/{format}", format=format)
patch.eject()
assert torch.equal(expected, 2 * model(x)), "it computes"
for format in ("fluxion", "peft"):
    again = adapters.load(model, f"{sys.argv[1]}/{format}", name=format)
    assert torch.equal(model(x), expected), format
    again.merge()
    torch.testing.assert_close(model(x), expected)
    again.eject()
assert "Gain" in repr(adapters.METHODS)
"""

FORMAT = """
import sys, torch
from torch import nn
import adapters, weights

a, b = torch.randn(2, 4), torch.randn(3, 2)
path = weights.save({"pairs/0/down": a, "pairs/0/up": b}, f"{sys.argv[1]}/made.safetensors")
assert weights.read_adapter(path).format == "pairs"
model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
expected = model(x) + x @ a.T @ b.T
adapters.load(model, path)
torch.testing.assert_close(model(x), expected)
"""

FAMILY = """
import sys, torch
from torch import nn
import adapters, weights

a, b = torch.randn(2, 4), torch.randn(12, 2)
names = {"lora_unet_stones_0_qkv.lora_down.weight": a, "lora_unet_stones_0_qkv.lora_up.weight": b}
path = weights.save(names, f"{sys.argv[1]}/original.safetensors")
block = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("to_q", "to_k", "to_v", "to_out")})
model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
x = torch.randn(2, 4)
expected = block["to_k"](x) + x @ a.T @ b[4:8].T
patch = adapters.load(model, path)
assert list(patch.targets) == ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"]
torch.testing.assert_close(model["blocks"][0]["to_k"](x), expected)
"""

COMMAND = """
import sys, torch
from torch import nn
import adapters
from adapters.cli import main

model = nn.Sequential(nn.Linear(4, 3))
adapters.inject(model, adapters.LoRA(rank=2)).save_pretrained(f"{sys.argv[1]}/out")
main(["count", f"{sys.argv[1]}/out"])
"""

TRIED = {
    "A method": (METHOD, "", 2),
    "A format": (FORMAT, "", 1),
    "A family": (FAMILY, "", 1),
    "A command": (COMMAND, "14\n", 1),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with all diffs of the page applied."""
    folder = tmp_path_factory.mktemp("copy")
    for package in ("fluxion", "weights", "adapters"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


def test_each_diff_is_one_new_file() -> None:
    for diff in DIFFS:
        assert diff.count("diff --git") == 1 and "new file mode" in diff
        assert sum(line.startswith("+") for line in diff.splitlines()) <= 31


@pytest.mark.parametrize("section", TRIED)
def test_it_works_without_any_other_change(section: str, copy: Path, tmp_path: Path) -> None:
    code, said, diffs = TRIED[section]
    assert PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0].count("```diff") == diffs
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    environment = {"PYTHONPATH": str(copy), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
