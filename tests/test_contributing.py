"""The page for contributors: each of its diffs adds one thing by one file, and that works."""

from __future__ import annotations

import json
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


RUN = """
import contextlib, io, json, sys, traceback
said = {}
for section, code in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(code, {"__name__": section})
        except SystemExit as end:
            problem = str(end.code or "")
        except BaseException:
            problem = traceback.format_exc()
        else:
            problem = ""
    said[section] = problem, output.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By section, the error and the output of its trial, in a copy of the packages with all diffs applied."""
    folder = tmp_path_factory.mktemp("copy")
    for package in ("fluxion", "weights", "adapters"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    trials = json.dumps({section: code for section, (code, _, _) in TRIED.items()})
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path_factory.mktemp("out"))]
    done = subprocess.run(
        command, input=trials, capture_output=True, text=True, env=environment, cwd=folder, check=True
    )
    return dict(json.loads(done.stdout))


def test_each_diff_is_one_new_file() -> None:
    for diff in DIFFS:
        assert diff.count("diff --git") == 1 and "new file mode" in diff
        assert sum(line.startswith("+") for line in diff.splitlines()) <= 30


@pytest.mark.parametrize("section", TRIED)
def test_it_works_without_any_other_change(section: str, outcomes: dict[str, list[str]]) -> None:
    _, said, diffs = TRIED[section]
    assert PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0].count("```diff") == diffs
    assert outcomes[section] == ["", said], outcomes[section][0]
