"""Several processes with a model between them compute, train and save what one does: by gloo, two of them or four."""

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


OF_TWO = (
    *("fsdp", "units", "ddp", "tensor_parallel", "messages", "checkpoint", "accelerate", "methods", "combined"),
    *("ignored", "compiled", "too_late", "loaded_after_sharding", "used", "units_that_cannot_leave"),
    *("an_error_of_the_one_that_writes", "elastic"),
)
OF_FOUR = ("fsdp", "ddp", "tensor_parallel", "both", "messages", "used")
RESTARTS = 3  # One is for the process that is killed. Now and then, another program takes the port meanwhile.


def launch(processes: int, *arguments: object) -> None:
    """Run the scenarios in so many processes, on this machine, as `torchrun` does."""
    options = ["--standalone", "--nproc-per-node", processes, "--max-restarts", RESTARTS]
    command = [sys.executable, "-m", "torch.distributed.run", *options, HERE / "worker.py", *arguments]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # After a restart, those who share one store may find where a killed process was to be found.
    surroundings = {**os.environ, **own, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280, env=surroundings)
    assert done.returncode == 0, done.stderr[-3000:]


def outcomes(processes: int, folder: Path, names: tuple[str, ...]) -> Found:
    """Outcomes of scenarios, in each process."""
    launch(processes, folder, *names)
    found: Found = json.loads((folder / "found.json").read_text())
    assert all(len(each) == processes for each in found.values())
    several = ((name, one) for name, each in found.items() for one in each if isinstance(one, dict))
    faults = [f"{name}: {one['fault']}" for name, one in several if "fault" in one]
    assert not faults, faults[0]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of two processes."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def of_two(folder: Path) -> Found:
    return outcomes(2, folder, OF_TWO)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Scenarios that differ with more processes."""
    return outcomes(4, tmp_path_factory.mktemp("four"), OF_FOUR)


@pytest.fixture(params=["of_two", pytest.param("of_four", marks=pytest.mark.exhaustive)])
def found(request: pytest.FixtureRequest) -> Found:
    either: Found = request.getfixturevalue(request.param)
    return either


def assert_all_hold(each: list[dict[str, bool]], count: int) -> None:
    for holds in each:
        assert len(holds) == count
        assert [name for name, one in holds.items() if not one] == []


@pytest.mark.parametrize("way", ["fsdp", "ddp", "tensor_parallel"])
def test_losses_are_those_of_one_process(found: Found, way: str) -> None:
    assert_near(found[way])


def test_losses_are_those_of_one_process_with_units_of_any_size(of_two: Found) -> None:
    assert_near(of_two["units"])


@pytest.mark.exhaustive
def test_losses_are_those_of_one_process_with_units_of_another_model(tmp_path: Path) -> None:
    assert_near(outcomes(2, tmp_path, ("units_of_llama",))["units_of_llama"])


@pytest.mark.exhaustive
def test_losses_are_those_of_one_process_where_ways_meet(of_four: Found) -> None:
    assert_near(of_four["both"])


def assert_near(each: list[dict[str, float]]) -> None:
    for off in each:
        assert off and all(value < 1e-6 for value in off.values()), off
        assert off == each[0]


def test_every_kind_of_method_trains_and_merges(of_two: Found) -> None:
    assert_all_hold(of_two["methods"], 5 * 4)


def test_patches_are_combined(of_two: Found) -> None:
    assert_all_hold(of_two["combined"], 3)


def test_what_is_divided_can_be_compiled(of_two: Found) -> None:
    assert all(of_two["compiled"])


def test_there_are_as_many_messages_as_without_adapters(found: Found) -> None:
    for messages in found["messages"]:
        assert messages == {"alone": [2, 2], "adapted": [2, 2]}


def test_what_would_train_wrong_is_refused(of_two: Found) -> None:
    assert all("leave it out of ignored_params" in said for said in of_two["ignored"])
    for refused in of_two["too_late"]:
        fixes = {"fsdp": "inject before fully_shard.", "ddp": "before it is wrapped.", "tensor": "parallel_plan."}
        assert len(refused) == 8
        for name, said in refused.items():
            assert said.endswith(fixes[name.split(",")[0].split(" ")[0]]), name


def test_what_is_not_trained_may_come_later(of_two: Found) -> None:
    assert all(of_two["loaded_after_sharding"])


def test_patches_are_used_as_in_one_process(found: Found) -> None:
    assert_all_hold(found["used"], 27)


def test_a_unit_with_its_adapter_stays_together(of_two: Found) -> None:
    assert all(
        "give it the block around the layer" in said and "ejected)" not in said
        for said in of_two["units_that_cannot_leave"]
    )


def test_all_raise_the_error_of_the_one_that_writes(of_two: Found) -> None:
    assert set(of_two["an_error_of_the_one_that_writes"]) == {"FileWriteError"}


def test_checkpoints_are_loaded_in_other_parts(of_two: Found) -> None:
    assert all(loaded == {"block": True, "root": True} for loaded in of_two["checkpoint"])


def test_accelerate(of_two: Found) -> None:
    assert of_two["accelerate"] == [True] * 2


@pytest.mark.usefixtures("of_two")
def test_a_killed_process_costs_the_steps_since_the_checkpoint(folder: Path) -> None:
    lines = [line.split() for line in (folder / "elastic" / "losses").read_text().splitlines()]
    steps = {run: [int(step) for name, step, _ in lines if name == run] for run in ("whole", "first", "again")}
    assert steps == {"whole": [*range(20)], "first": [*range(13)], "again": [*range(10, 20)]}
    losses = [{step: loss for name, step, loss in lines if (name == "whole") == whole} for whole in (True, False)]
    assert losses[0] == losses[1]  # To the last digit.
    files = [folder / "elastic" / name / "adapter_model.safetensors" for name in ("whole", "adapter")]
    assert files[0].read_bytes() == files[1].read_bytes()
