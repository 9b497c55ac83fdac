"""One process = DDP = ZeRO-1 = ZeRO-2 = ZeRO-3 = FSDP2, for the cases of backends.py.

All of them under DDP, ZeRO-3 and FSDP2, which differ most; the main ones under the others, for the sake of time. The
table of `python tests/distributed/backends.py` has them all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from backends import BACKENDS, CASES, WRAPPED, difference, launch, result
from filelock import FileLock

WHOLE = ("DDP", "ZeRO-3", "FSDP2")
MAIN = [name for name in CASES if name.startswith(("relation", "projectors", "saved", "resumed"))]
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("distributed")]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def one_process(shared: Path) -> Path:
    folder = shared / "one_process"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            launch(folder, None)
            (folder / "done").touch()
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_run_as_in_one_process(backend: str, one_process: Path, shared: Path, tmp_path: Path) -> None:
    cases = {name: case for name, case in CASES.items() if backend in WHOLE or name in MAIN}
    with FileLock(shared / "two_processes.lock"):  # two at a time are all that two cores can take
        launch(tmp_path / "two", backend, cases)
    for case in cases:
        found = result(tmp_path / "two" / case)
        assert found[0]["processes"] == 2 and found[0]["wrapped"] == WRAPPED.get(backend, "DeepSpeedEngine")
        assert difference(result(one_process / case), found) <= 1e-5, case


def test_a_resumed_run_is_the_uninterrupted_one(one_process: Path) -> None:
    """The cases above compare both with one process; here with each other."""
    whole, resumed = (result(one_process / case) for case in ("saved on the way", "resumed"))
    assert difference(whole, resumed) <= 1e-6
