"""What goes wrong around a run: killed processes, dead ranks and workers, full disks, files that are cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from backends import HERE, ROOT
from datasets import Dataset
from helpers_trainer import ROWS, STUDENT, TEACHERS
from safetensors.torch import load_file

from kv_trainer.manifest import last_whole

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("distributed")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def test_no_kill_loses_what_was_saved(tmp_path: Path) -> None:
    """Twenty-two runs are killed, most of them in the middle of a save; the last one ends as if none had been."""
    subprocess.run(
        [sys.executable, str(HERE / "killed.py"), str(tmp_path)], env=ENVIRONMENT, check=True, timeout=400,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    records = json.loads((tmp_path / "records.json").read_text())
    assert sum(r["killed"] for r in records) >= 20 and not records[-1]["killed"] and records[-1]["status"] == 0
    steps = [int((r["after"] or "-0").rpartition("-")[2]) for r in records]
    assert steps == sorted(steps) and steps[-1] == 150, "a run never falls behind the one before it"
    assert sum(bool(r["halves"]) for r in records) >= 5, "too few kills came in the middle of a save"
    one, other = tmp_path / "whole", tmp_path / "killed"
    for file in ("model.safetensors", "kv_bridge.safetensors"):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        assert max(float((x - second[name]).abs().max()) for name, x in first.items()) <= 1e-6
    losses = [json.loads((folder / "curve.json").read_text()) for folder in (one, other)]
    assert len(losses[0]) == len(losses[1]) == 150
    assert max(abs(a - b) for a, b in zip(*losses)) <= 1e-5


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A recipe on saved tiny models and rows: home/recipe.yaml."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model("llama", **STUDENT).save_pretrained(folder / "student")
    tiny_tokenizer(40).save_pretrained(folder / "student")
    family, config, merges, bos = TEACHERS["fine"]
    tiny_model(family, seed=7, **config).save_pretrained(folder / "teacher")
    tiny_tokenizer(merges, bos=bos).save_pretrained(folder / "teacher")
    Dataset.from_list(ROWS).to_json(folder / "train.jsonl")
    recipe = {
        "student": {"model": "./student"}, "teachers": {"fine": {"model": "./teacher"}},
        "losses": {"cross_entropy": {}, "kv": {"weight": 0.5}}, "data": {"path": "./train.jsonl", "eval_split": None},
        "training": {"max_steps": 400, "save_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True,
                     "disable_tqdm": True},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def command(home: Path, output: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> list[str]:
    train = ["-m", "kv_trainer", "train", str(home / "recipe.yaml"), "--training.output_dir", str(output), *overrides]
    return [sys.executable, *launcher, *train]


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that is told of a user's error."""
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("kv-trainer: error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return lines[0]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=ROOT, **options)


LARGEST = 65536  # bytes of a file, less than the student's weights: as on a full disk, in the middle of a file


@pytest.fixture(scope="module")
def told(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """What was wrong -> the folder of a run, and what it complained of; all of them forks of one process."""
    folder = tmp_path_factory.mktemp("told")
    for name in ("cut", "bare"):
        (folder / name).mkdir()
        for file in (home / "teacher").iterdir():
            data = file.read_bytes()
            half = file.suffix == ".safetensors"
            if not (half and name == "bare"):
                (folder / name / file.name).write_bytes(data[: len(data) // 2] if half else data)
    changes: dict[str, list[str]] = {
        **{name: ["--teachers.fine.model", str(folder / name)] for name in ("cut", "bare")}, "full": [],
    }  # fmt: skip
    jobs = [{
        "arguments": command(home, folder / f"{name}-out", *more)[3:], "output": str(folder / f"{name}.log"),
        "largest_file": LARGEST if name == "full" else None,
    } for name, more in changes.items()]  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run([sys.executable, str(HERE / "warm.py"), str(folder / "jobs.json")])
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for name in changes:
        status, log = int((folder / f"{name}.log.status").read_text()), (folder / f"{name}.log").read_text()
        found[name] = folder, complaint(subprocess.CompletedProcess("", status, "", log))
    return found


def test_a_teacher_that_is_cut_off(told: dict[str, tuple[Path, str]]) -> None:
    folder, said = told["cut"]
    assert str(folder / "cut") in said and not (folder / "cut-out" / "model.safetensors").exists()


def test_a_teacher_without_weights(told: dict[str, tuple[Path, str]]) -> None:
    folder, said = told["bare"]
    assert str(folder / "bare") in said


def test_a_disk_that_is_full(told: dict[str, tuple[Path, str]]) -> None:
    folder, said = told["full"]
    out = folder / "full-out"
    assert "checkpoint-1" in said
    assert last_whole(out)[0] is None
    assert not list(out.rglob("model.safetensors")), "half a file stays"


def until(condition: Any, process: subprocess.Popen[str], seconds: float = 90) -> None:
    start = time.monotonic()
    while not condition():
        assert process.poll() is None, f"it ended: {process.communicate()[1][-2000:]}"
        assert time.monotonic() - start < seconds, "it takes too long"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def start(command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def test_a_loader_worker_that_dies(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(command(home, out, "--training.dataloader_num_workers", "1"))
    until(lambda: last_whole(out)[0] is not None and children(process.pid), process)
    # One that has handed over its last batch is not missed: each epoch has a new one, so kill until one is.
    while process.poll() is None:
        for child in children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert "DataLoader worker" in complaint(subprocess.CompletedProcess("", process.returncode, "", errors))
    assert last_whole(out)[0] is not None


def test_a_rank_that_dies(home: Path, tmp_path: Path) -> None:
    """The launcher takes the other rank down; what was saved is resumed from."""
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(command(home, out, launcher=launcher))
    until(lambda: last_whole(out)[0] is not None, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    begun = time.monotonic()
    process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - begun < 90
    kept = last_whole(out)[0]
    assert kept is not None
    last = str(int(kept.name.rpartition("-")[2]) + 2)
    done = run(command(home, out, "--resume", "--training.max_steps", last))  # on one process: told, not refused
    assert done.returncode == 0 and f"resuming from {kept}" in " ".join(done.stdout.split()).replace("- ", "-")
    assert "step.processes was 2, is 1" in done.stderr
