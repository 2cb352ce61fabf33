from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# How long an example takes is for the benchmarks to say: a machine that has other things to do fails no test.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# As many tests run at once as there are cores: neither they nor what they start should have more than one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


# Those that take longest, which begin first, so that no core waits for another one at the end.
LONGEST = (
    "tests/distributed",
    "tests/test_serving.py",
    "tests/adapters/cli/test_demo.py",
    "tests/browser",
    "tests/adapters/test_compile.py",
    "tests/faults",
    "tests/test_examples.py",
    "tests/test_packaging.py",
    "tests/weights/test_streaming.py",
    "tests/adapters/cli/test_examples.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first."""
    others = len(LONGEST)
    items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if item.nodeid.startswith(name)), others))


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One thread, as the number of threads changes the last bits of sums, and the same random numbers each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` takes half a millisecond, for other devices.
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the documentation as `make site` builds it, where any warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    settings = Path(__file__).parents[1] / "docs" / "site" / "mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file", settings]
    subprocess.run([*command, "--site-dir", folder], check=True)
    return folder
