"""The runner, on a program that stands for a run: order, what is not run again, what fails, and what is stopped."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from kv_trainer.experiments.archive import pack, runs_in
from kv_trainer.experiments.compare import others_finished
from kv_trainer.experiments.experiment import Experiment, load_experiment
from kv_trainer.experiments.fingerprints import hash_files, hash_inputs
from kv_trainer.experiments.jobs import Job
from kv_trainer.experiments.runner import Runner, alone
from kv_trainer.experiments.shared import take_finished
from kv_trainer.recipes import settings_of

FAKE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
get = lambda name: words[words.index(name) + 1] if name in words else None
folder = pathlib.Path(get("--training.output_dir"))
with open("log", "a") as log:
    log.write(f"{folder.name} {get('--training.max_steps')} {os.environ.get('OMP_NUM_THREADS')} "
              f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if folder.name.startswith("hangs"):
    time.sleep(60)
if folder.name.startswith("fails"):
    sys.exit("kv-trainer: error: this one fails")
(folder / "recipe.yaml").write_text("{training: {max_steps: 10}}")
steps = int(get("--training.max_steps") or 10)
seconds = 1.0 if folder.name.startswith("ce") else 3.0
(folder / "arm.json").write_text(json.dumps({"seed": 1, "steps": steps, "tokens": 9, "machine": "m",
                                               "clocks": {"wall": [seconds]}, "metrics": {}}))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(Job, "recipe_text", lambda self, steps=None: "{training: {max_steps: 10}}")
    for module in ("jobs", "shared"):
        monkeypatch.setattr(
            f"kv_trainer.experiments.{module}.saved_recipe", lambda folder: (folder / "recipe.yaml").read_text()
        )
    Path("r.yaml").write_text("x")
    Path("fake.py").write_text(FAKE)
    return tmp_path


def runner(arms: str, processes: int = 2) -> Runner:
    Path("e.yaml").write_text(f"recipe: r.yaml\nseeds: [1, 2]\nprocesses: {processes}\narms: {arms}")
    experiment = load_experiment("e.yaml")
    experiment.launcher = [sys.executable, "fake.py"]
    return Runner(experiment, lambda job, record, ran: told.append((job.arm, job.seed, ran)))


BARE = {"seed": 1, "steps": 10, "tokens": 9, "machine": "m", "clocks": {"wall": [2.0]}, "metrics": {}}
told: list = []
TIMED = "{ce: {}, timed: {like: ce, seconds_of: full}, full: {}}"


def jobs(one: Runner) -> list[Job]:
    return [Job(one.experiment, arm, seed) for seed in (1, 2) for arm in one.experiment.needed(one.experiment.arms)]


def test_runs_are_made_once_and_a_timed_one_after_those_it_waits_for() -> None:
    told.clear()
    one = runner(TIMED)
    assert one.run(jobs(one)) == {} and len(one.records) == 6
    assert one.records["timed", 2]["steps"] == 30, "three times the seconds of ce"
    lines = Path("log").read_text().split("\n")
    assert len(lines) == 7 and all(ran for *_, ran in told)
    again = runner(TIMED)
    again.run(jobs(again))
    assert Path("log").read_text().split("\n") == lines and not any(ran for *_, ran in told[6:])
    assert again.records == one.records


def test_runs_of_another_experiment_with_the_same_settings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the same seed; not of a timed arm; with a word of where they are from."""

    def text(self: Job, steps: int | None = None) -> str:
        return f"{{training: {{max_steps: 10, output_dir: {self.folder}, seed: {self.seed}}}, set: {self.arm[0]}}}"

    monkeypatch.setattr(Job, "recipe_text", text)
    monkeypatch.setattr(Job, "record", lambda self: read(self.folder))
    first, second = Path("one"), runner("{base: {}, n: {}, timed: {like: base, seconds_of: n}}")
    for name, seed in (("best", 1), ("timed", 1), ("other", 2)):
        run = first / f"{name}-{seed}"
        (run / "checkpoint-5").mkdir(parents=True)
        given = f"{{training: {{max_steps: 10, output_dir: x, seed: {seed}}}, set: {name[0]}}}"
        (run / "recipe.yaml").write_text(given)
        (run / "arm.json").write_text(json.dumps({**BARE, "seconds": 2.0, "name": name}))
    second.experiment.runs_from = ["one", "nowhere"]
    made: list[str] = []

    def start(self: Runner, job: Job, steps: int | None, number: int) -> dict:
        made.append(job.folder.name)
        return {"steps": 10, "seconds": 1.0}

    monkeypatch.setattr(Runner, "_start", start)
    monkeypatch.setattr(Job, "check_time", lambda self, records: None)
    told.clear()
    assert second.run(jobs(second)) == {}
    assert sorted(made) == ["base-2", "n-1", "n-2", "timed-1", "timed-2"] and ("base", 1, False) in told
    assert second.records["base", 1] == {"taken_from": "one/best-1", **BARE, "seconds": 2.0, "name": "best"}
    taken = Job(second.experiment, "base", 1).folder
    assert sorted(p.name for p in taken.iterdir()) == ["arm.json", "recipe.yaml"]
    assert (taken / "recipe.yaml").read_text() == text(Job(second.experiment, "base", 1))


def test_a_begun_run_stays_and_one_that_cannot_be_read_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(folder: Path) -> str:
        if folder.name == "bad-1":
            raise ValueError("Unknown key")
        return "{training: {max_steps: 10}}"

    monkeypatch.setattr("kv_trainer.experiments.shared.saved_recipe", saved)
    one = runner("{ce: {}}")
    one.experiment.runs_from = ["other"]
    job = Job(one.experiment, "ce", 1)
    for name in ("bad-1", "good-1"):
        (Path("other") / name).mkdir(parents=True)
        (Path("other") / name / "arm.json").write_text(json.dumps({**BARE, "processes": 2 if name == "good-1" else 1}))
    assert not take_finished(job), "a run of two processes sees other batches"
    (Path("other") / "good-1" / "arm.json").write_text(json.dumps(BARE))
    (job.folder / "checkpoint-5").mkdir(parents=True)
    assert not take_finished(job) and (job.folder / "checkpoint-5").exists()
    (job.folder / "checkpoint-5").rmdir()
    (job.folder / "log.txt").write_text("failed")
    assert take_finished(job) and read(job.folder) == {"taken_from": "other/good-1", **BARE}


def test_runs_are_taken_from_an_archive_of_another_checkout() -> None:
    one = runner("{ce: {}, other: {}}")
    one.run(jobs(one))
    (Job(one.experiment, "ce", 1).folder / "model.safetensors").write_text("weights stay where they are")
    pack(jobs(one), Path("runs.zip"))
    first = Path("runs.zip").read_bytes()
    pack(reversed(jobs(one)), Path("runs.zip"))
    assert Path("runs.zip").read_bytes() == first, "the same runs are the same file"
    again = runner("{ce: {}}")
    again.experiment.output_dir, again.experiment.launcher = "elsewhere", []
    again.experiment.runs_from = ["runs.zip"]
    assert again.run(jobs(again)) == {} and Path("log").read_text().count("\n") == 4
    assert again.records["ce", 2]["taken_from"] == "runs.zip/ce-2"
    assert sorted(p.name for p in Path("elsewhere/ce-1").iterdir()) == ["arm.json", "recipe.yaml"]


def test_an_archive_is_unpacked_once_for_runs_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that unpack it at once, the folder of one would be gone before its runs are copied."""
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        archive.writestr("ce-1/arm.json", "{}")
    inner = zipfile.ZipFile.extractall
    monkeypatch.setattr(zipfile.ZipFile, "extractall", lambda *given: (time.sleep(0.1), inner(*given)))
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(runs_in, [str(tmp_path / "runs.zip")] * 4))
    assert len(found) == 1 and (found.pop() / "ce-1" / "arm.json").exists()


@pytest.mark.parametrize("name", ["../arm.json", "/ce-1/arm.json", "ce-1/../../arm.json", "..x/arm.json", "ce-1/a.pkl"])
def test_an_archive_writes_nowhere_else(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("ce-1/arm.json", "{}")
        archive.writestr(name, "{}")
    with pytest.raises(ValueError, match="no part of a run"):
        runs_in(str(tmp_path / "bad.zip"))
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match="neither a folder nor a whole archive"):
        runs_in(str(tmp_path / "text.zip"))


def read(folder: Path) -> dict | None:
    return json.loads((folder / "arm.json").read_text()) if (folder / "arm.json").exists() else None


def test_a_finished_run_of_other_settings_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner("{ce: {}}")
    one.run(jobs(one))
    monkeypatch.setattr(Job, "recipe_text", lambda self, steps=None: "{training: {max_steps: 20}}")
    again = runner("{ce: {}}")
    failed = again.run(jobs(again))
    assert len(failed) == 2
    assert "other settings: training.max_steps was 10, is 20" in str(next(iter(failed.values())))


def test_a_finished_run_of_files_that_have_changed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher trained anew, or rows made anew, in a folder of the old name."""
    text = "{training: {max_steps: 10}, data: {path: rows.jsonl}, teachers: {big: {model: big}}}"
    monkeypatch.setattr(Job, "recipe_text", lambda self, steps=None: text)
    Path("rows.jsonl").write_text("1")
    one = runner("{ce: {}}")
    job = jobs(one)[0]
    job.folder.mkdir(parents=True)
    (job.folder / "recipe.yaml").write_text(text)
    then = {"teachers.big.model": "not here now", **hash_inputs(settings_of(text))}
    assert "data.path" in then
    (job.folder / "arm.json").write_text(json.dumps({**BARE, "inputs": then}))
    assert job.record() is not None
    Path("rows.jsonl").write_text("2")
    hash_files.cache_clear()
    with pytest.raises(ValueError, match="holds a finished run of what data.path was before. Remove it to run it"):
        job.record()
    again = runner("{ce: {}}")
    again.experiment.output_dir = "elsewhere"
    again.experiment.runs_from = [one.experiment.output_dir]
    assert not take_finished(jobs(again)[0])
    Path("rows.jsonl").unlink()
    assert take_finished(jobs(again)[0]), "what is not here cannot have changed"


def test_what_fails_is_told_and_the_others_run_on() -> None:
    one = runner("{fails: {}, ce: {}, timed: {like: ce, seconds_of: fails}}")
    failed = {f"{job.arm}-{job.seed}": str(error) for job, error in one.run(jobs(one)).items()}
    assert set(one.records) == {("ce", 1), ("ce", 2)}
    assert failed["fails-1"].startswith("kv-trainer: error: this one fails (exit status 1; see ")
    assert failed["timed-2"] == "it waits for fails-2, which failed"
    assert "timed" not in Path("log").read_text()


def test_whatever_stops_it_stops_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = runner("{hangs: {}, ce: {}}")
    started = []
    inner = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(inner(*a, **k)) or started[-1])

    def interrupt() -> None:
        while not Path("log").exists() or Path("log").read_text().count("hangs") < 2:
            time.sleep(0.02)
        while not stopped.is_set():  # one that arrives in a callback of the garbage collector is lost
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            stopped.wait(5)

    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        try:
            one.run(jobs(one))
        finally:
            stopped.set()
            signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 30
    assert started and all(process.poll() is not None for process in started)


def test_processes_beside_each_other_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    one = runner("{ce: {}}", processes=2)
    one.run(jobs(one))
    assert Path("log").read_text().split("\n")[0].split()[2] == "4"


@pytest.mark.parametrize(("visible", "expected"), [("4,7", {"4", "7"}), (None, {"0", "1", "2"}), ("", {""})])
def test_processes_beside_each_other_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: set[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    one = runner("{ce: {}, a: {}, b: {}, c: {}}", processes=len(expected))
    first = jobs(one)[0]
    given = [one._environment(number, first).get("CUDA_VISIBLE_DEVICES") for number in range(len(expected))]
    assert set(given) == expected
    one.run(jobs(one))
    assert {line.split(" ")[3] for line in Path("log").read_text().splitlines()} <= expected
    with pytest.raises(ValueError, match="each launched run would take all devices"):
        Experiment(processes=2, launcher=["/usr/bin/accelerate", "launch"])
    Experiment(processes=2, launcher=["nice", "python"])
    monkeypatch.setattr(Job, "recipe_text", lambda self, steps=None: "{teachers: {big: {device_map: 'cuda:1'}}}")
    assert one._environment(1, first).get("CUDA_VISIBLE_DEVICES") == visible, "it names devices itself"


def test_a_part_that_is_run_again_is_reported_with_all_that_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one arm alone would be tested as if it were the only one."""
    one = runner("{ce: {}, a: {}, b: {}, c: {}}")
    one.run([Job(one.experiment, arm, seed) for arm in ("ce", "a", "b") for seed in (1, 2)])
    one.run([Job(one.experiment, "c", 1)])
    shown = io.StringIO()
    found = others_finished(Console(file=shown), one.experiment, ["ce", "a"], [1, 2], {})
    assert sorted(found) == [("b", 1), ("b", 2)] and not shown.getvalue()
    (Path(one.experiment.output_dir) / "b-1" / "recipe.yaml").write_text("{training: {max_steps: 11}}")
    assert others_finished(Console(file=shown, width=999), one.experiment, ["ce", "a"], [1, 2], {}) == {}
    assert "not in the report: b: " in shown.getvalue() and "of other settings" in shown.getvalue()


def test_a_timed_arm_that_is_no_longer_as_long_is_left_out_of_the_report() -> None:
    one = runner(TIMED)
    one.run(jobs(one))
    path = Path(one.experiment.output_dir) / "full-1" / "arm.json"
    path.write_text(path.read_text().replace("3.0", "6.0"))
    records = {(arm, seed): Job(one.experiment, arm, seed).record() for arm in ("ce", "full") for seed in (1, 2)}
    shown = io.StringIO()
    found = others_finished(Console(file=shown, width=999), one.experiment, ["ce", "full"], [1, 2], records)
    assert found == {} and "not in the report: timed: " in shown.getvalue() and "it would be 60 now" in shown.getvalue()


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with alone(folder), pytest.raises(ValueError, match="Another experiment, or a run of one"), alone(folder):
        pass
    with alone(folder):
        pass


def test_a_run_that_outlives_its_experiment_keeps_others_out(tmp_path: Path) -> None:
    """As after `kill -9` of the experiment, which can stop nothing any more."""
    pytest.importorskip("fcntl")
    sleeps = [sys.executable, "-c", "input()"]
    with alone(tmp_path) as lock:
        left = subprocess.Popen(sleeps, stdin=subprocess.PIPE, pass_fds=lock)
    with pytest.raises(ValueError, match="a run of one that was killed, is still at work"), alone(tmp_path):
        pass
    left.communicate(b"\n")
    with alone(tmp_path):
        pass


def test_a_run_is_given_the_lock_of_its_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = []
    inner = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: kept.append(k["pass_fds"]) or inner(*a, **k))
    one = runner("{ce: {}}")
    with alone(tmp_path) as one.kept:
        assert not one.run(jobs(one)) and kept == [one.kept] * 2 and one.kept


@pytest.mark.parametrize("content", ["{}", "[]", '{"steps": 3, "clocks": {'])
def test_a_damaged_record_is_named(content: str) -> None:
    one = runner("{ce: {}}")
    one.run(jobs(one))
    path = Path(one.experiment.output_dir) / "ce-1" / "arm.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="ce-1/arm.json is (no record of a run: it has no|damaged)"):
        Job(one.experiment, "ce", 1).record()


@pytest.mark.parametrize("kind", ["flipped", "deflated", "encrypted", "cut"])
def test_a_damaged_archive_is_refused(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "runs.zip"
    how = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_LZMA
    with zipfile.ZipFile(place, "w", how) as archive:
        archive.writestr("ce-1/arm.json", json.dumps({"numbers": list(range(3000))}))
    whole = bytearray(place.read_bytes())
    if kind == "encrypted":  # its flag, in both headers
        for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            whole[whole.index(mark) + at] |= 1
    elif kind == "cut":
        del whole[len(whole) // 2 :]
    else:
        middle = len(whole) // 3
        whole[middle : middle + 40] = bytes(255 - byte for byte in whole[middle : middle + 40])
    place.write_bytes(whole)
    with pytest.raises(ValueError, match="runs.zip is neither a folder nor a whole archive of runs"):
        runs_in(str(place))


def test_an_archive_of_too_much_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kv_trainer.experiments.archive.LARGEST_SUM", 1000)
    with zipfile.ZipFile(tmp_path / "runs.zip", "w", zipfile.ZIP_LZMA) as archive:
        for seed in range(3):
            archive.writestr(f"ce-{seed}/arm.json", "x" * 400)
    with pytest.raises(ValueError, match="no archive of runs is so large"):
        runs_in(str(tmp_path / "runs.zip"))


def test_a_run_as_long_as_another_took_once_is_refused_when_that_has_changed(folder: Path) -> None:
    arms = "{ce: {}, timed: {like: ce, seconds_of: full}, full: {}}"
    first = runner(arms)
    assert not first.run(jobs(first))
    record = json.loads((folder / "outputs" / folder.name / "e" / "full-1" / "arm.json").read_text())
    record["clocks"]["wall"] = [6.0]
    (folder / "outputs" / folder.name / "e" / "full-1" / "arm.json").write_text(json.dumps(record))
    second = runner(arms)
    failed = {job.folder.name: str(error) for job, error in second.run(jobs(second)).items()}
    assert list(failed) == ["timed-1"] and "was given 30 steps; by the seconds" in failed["timed-1"]
    assert "it would be 60 now" in failed["timed-1"]


def test_what_others_need_is_compared_with_an_arm_that_is_there() -> None:
    one = runner("{ce: {}, c: {}, b: {against: c}, t: {like: b, seconds_of: ce}}")
    assert one.experiment.needed(["t"]) == ["ce", "c", "b", "t"]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("{ce: {set: {training.hub_token: hf_x}}}", "sets training.hub_token, which the report would show"),
        ("{ce: {against: b}, b: {}}", "arms.ce.against .* has no effect"),
    ],
)
def test_an_experiment_that_would_leak_or_ignore_is_refused(arms: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner(arms)
