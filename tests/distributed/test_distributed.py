"""Several processes with a model between them compute, train and save what one does: by gloo, two of them and four."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Found = dict[str, list[Any]]


def launch(script: str, processes: int, *arguments: object, restarts: int = 0) -> None:
    """Run a script in so many processes, on this machine, as `torchrun` does; they find each other by a free port."""
    options = ["--standalone", "--nproc-per-node", processes, "--max-restarts", restarts]
    command = [sys.executable, "-m", "torch.distributed.run", *options, HERE / script, *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # After a restart, those who share one store may find where a killed process was to be found.
    surroundings = {**os.environ, **own, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What came out in each process."""
    folder = tmp_path_factory.mktemp("distributed")
    launch("worker.py", request.param, folder)
    outcome: Found = json.loads((folder / "found.json").read_text())
    assert all(len(each) == request.param for each in outcome.values())
    several = ((name, one) for name, each in outcome.items() for one in each if isinstance(one, dict))
    faults = [f"{name}: {one['fault']}" for name, one in several if "fault" in one]
    assert not faults, faults[0]
    return outcome


@pytest.mark.parametrize("way", ["fsdp", "ddp", "tensor_parallel", "both"])
def test_losses_are_those_of_one_process(found: Found, way: str) -> None:
    for off in found[way]:
        assert off or (way == "both" and len(found[way]) == 2)  # Which takes two times two.
        assert all(value < 1e-6 for value in off.values()), off
    assert all(off == found[way][0] for off in found[way])


def test_there_are_as_many_messages_as_without_adapters(found: Found) -> None:
    for messages in found["messages"]:
        assert messages == {"alone": [2, 2], "adapted": [2, 2]}


def test_what_would_train_wrong_is_refused(found: Found) -> None:
    for refused in found["too_late"]:
        fixes = {"fsdp": "inject before fully_shard.", "ddp": "before it is wrapped.", "tensor": "parallel_plan."}
        assert len(refused) == 8
        for name, said in refused.items():
            assert said.endswith(fixes[name.split(",")[0].split(" ")[0]]), name


def test_what_is_not_trained_may_come_later(found: Found) -> None:
    assert all(found["loaded_after_sharding"])


def test_patches_are_used_as_in_one_process(found: Found) -> None:
    for used in found["used"]:
        assert len(used) == 27
        assert [name for name, holds in used.items() if not holds] == []


def test_a_unit_with_its_adapter_stays_together(found: Found) -> None:
    assert all(
        "give it the block around the layer" in said and "ejected)" not in said
        for said in found["units_that_cannot_leave"]
    )


def test_all_raise_the_error_of_the_one_that_writes(found: Found) -> None:
    assert set(found["an_error_of_the_one_that_writes"]) == {"FileWriteError"}


def test_checkpoints_are_loaded_in_other_parts(found: Found) -> None:
    assert all(loaded == {"block": True, "root": True} for loaded in found["checkpoint"])


def test_accelerate(found: Found) -> None:
    assert found["accelerate"] in ([True] * 2, [None] * 4)  # Two are enough.


def test_a_killed_process_costs_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    losses: dict[str, dict[int, str]] = {}
    for name in ("whole", "kill"):
        folder = tmp_path / name
        folder.mkdir()
        launch("elastic.py", 2, folder, name, restarts=1)
        lines = [line.split() for line in (folder / "losses").read_text().splitlines()]
        losses[name] = {int(step): loss for _, step, loss in lines}
        if name == "kill":
            assert [int(step) for count, step, _ in lines if count == "0"] == [*range(12)]
            assert [int(step) for count, step, _ in lines if count == "1"] == [*range(10, 20)]
    assert losses["whole"] == losses["kill"]  # To the last digit.
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "kill")]
    assert files[0].read_bytes() == files[1].read_bytes()
