"""One process = DDP = ZeRO-1 = ZeRO-2 = ZeRO-3 = FSDP2, for the cases of backends.py.

All of them under DDP, ZeRO-3 and FSDP2, which differ most; the main ones under the others, for the sake of time. The
table of `python tests/distributed/backends.py` has them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from backends import BACKENDS, CASES, ONE, WRAPPED, complaint, difference, launch, result

MAIN = [n for n in CASES if n.startswith(("relation", "projectors", "resumed", "bfl")) or n == "saved on the way"]
LEAST = ["relation, two teachers", "saved on the way", "resumed"]  # offloading changes where ZeRO-3 keeps its state
SOME = {"ZeRO-1": [*LEAST, "projectors, two teachers, checkpointing"], "ZeRO-2": MAIN, "ZeRO-3 offload": LEAST}
RUNS = {backend: SOME.get(backend, list(CASES)) for backend in (ONE, *BACKENDS)}
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("distributed")]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """backend/case: the results of all runs, made by one process that forks their ranks."""
    folder = tmp_path_factory.mktemp("backends")
    launch(folder, RUNS)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_run_as_in_one_process(backend: str, runs: Path) -> None:
    assert complaint(runs / ONE) is None
    assert complaint(runs / backend) is None
    for case in RUNS[backend]:
        found = result(runs / backend / case)
        assert found[0]["processes"] == 2 and found[0]["wrapped"].startswith(WRAPPED.get(backend, "DeepSpeedEngine"))
        assert difference(result(runs / ONE / case), found) <= CASES[case].get("within", 1e-5), case


def test_one_test_worker_makes_all_runs(request: pytest.FixtureRequest) -> None:
    """pytest 9.2.0 sends the tests of an xdist group to all workers, which would make every run once more."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@distributed"), "the group is not seen; see setup.cfg"


def test_a_resumed_run_is_the_uninterrupted_one(runs: Path) -> None:
    """The cases above compare both with one process; here with each other."""
    whole, resumed = (result(runs / ONE / case) for case in ("saved on the way", "resumed"))
    assert difference(whole, resumed) <= 1e-6
