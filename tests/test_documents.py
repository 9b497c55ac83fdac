"""What the documents say is what the committed results say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from helpers_models import FAMILIES

from kv_trainer.experiments.experiment import load_experiment
from kv_trainer.experiments.shared import finished

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "benchmarks"), str(RESULTS)]
import publish  # noqa: E402

ROWS = (
    "step_over_floor", "step_over_floor_all_losses", "stored_step_over_sft", "step_over_gkd", "memory_over_gkd",
    "step_over_gold_uld", "memory_over_sft_plus_teachers", "five_teachers_memory_over_one", "importance_step_share",
    "importance_memory_over_eager", "time_exponent_in_length", "time_exponent_in_teachers",
)  # fmt: skip


@pytest.fixture(scope="module")
def benchmarks() -> dict:
    return json.loads((RESULTS / "benchmarks.json").read_text())


def test_the_table_of_benchmarks_is_that_of_the_results(benchmarks: dict) -> None:
    from importlib import import_module

    module = import_module("all")
    page = (RESULTS / "benchmarks.md").read_text()
    shown = page.partition(module.START)[2].partition(module.END)[0].strip()
    assert shown == module.table(benchmarks["rows"])


PUBLISHED = sorted(path.parent for path in RESULTS.glob("*/results.json"))


@pytest.mark.parametrize("path", publish.documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_of_a_document_is_that_of_the_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert publish.fill(text) == text, "python docs/results/publish.py fills it again"
    assert text.count("<!-- / -->") == len(publish.FIGURE.findall(text)), "a marker is not as publish.py reads it"


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_a_published_study_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experiment file is there with its arms, its report has its pictures, and somebody says what it means."""
    found = json.loads((folder / "results.json").read_text())
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(found["experiment"])
    assert set(found["arms"]) == set(experiment.arms) and not found["missing"] and not found["quick"]
    report = (folder / "report.md").read_text()
    assert found["experiment"] in report and found["rule"] in report
    assert all((folder / picture).is_file() for picture in re.findall(r"\]\((figures/[^)]+)\)", report))
    for values in found["arms"].values():
        assert all(len(each) == len(found["seeds"]) for each in values.values())
    assert "report.md" in (folder / "README.md").read_text()


ARCHIVES = sorted(RESULTS.glob("*/runs.zip"))


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.parent.name)
def test_the_runs_of_a_published_study_are_those_of_its_results(archive: Path) -> None:
    found = json.loads((archive.parent / "results.json").read_text())
    records = {path.parent.name: json.loads(path.read_text()) for path in finished(str(archive))}
    assert set(records) == {f"{arm}-{seed}" for arm in found["arms"] for seed in found["seeds"]}
    for arm, metrics in found["arms"].items():
        for metric, values in metrics.items():
            assert values == [records[f"{arm}-{seed}"]["metrics"][metric] for seed in found["seeds"]]


def test_a_document_is_filled_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {
        "seeds": [1, 2], "against": "a", "arms": {"a": {"accuracy": [0.5, 0.7]}, "b": {"accuracy": [0.1, 0.1]}},
        "budget": {"a": {"steps": 1200.0}}, "reached": {"b": {"steps": [240, 360]}},
        "comparisons": [
            {"arm": "a", "against": other, "metric": "accuracy", "p": p, "low": low, "high": 0.5}
            for other, p, low in (("c", 0.03, None), ("b", 0.2, -0.2))
        ],
    }  # fmt: skip
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "results.json").write_text(json.dumps(content))
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    publish.results.cache_clear()
    marks = {"a accuracy": "60.0% ± 14.1", "a accuracy mean": "60.0%", "a accuracy 2": "70.0%", "a steps": "1,200",
             "b-a reached_steps": "25%",
             "a-b accuracy": "+50.0 points", "a accuracy p": "0.030", "a-b accuracy p": "0.200",
             "a-b accuracy interval": "-20.0 to +50.0"}  # fmt: skip
    for mark, shown in marks.items():
        assert publish.fill(f"x <!-- s {mark} -->old<!-- / --> y") == f"x <!-- s {mark} -->{shown}<!-- / --> y"
    wrong = (
        "a-d accuracy p", "a-b accuracy 2", "a-b steps", "a steps 2", "a accuracy 7", "c accuracy", "b accuracy p",
        "b-c reached_steps", "a accuracy interval",
    )  # fmt: skip
    for mark in wrong:
        with pytest.raises(LookupError):
            publish.fill(f"<!-- s {mark} -->x<!-- / -->")
    assert publish.fill("<!-- results --> and <!-- table --> stay") == "<!-- results --> and <!-- table --> stay"
    publish.results.cache_clear()


def test_every_row_is_there_and_names_a_command_that_is(benchmarks: dict) -> None:
    rows = {row["name"]: row for row in benchmarks["rows"]}
    assert set(ROWS) <= set(rows) and {"torch", "transformers"} <= set(benchmarks["versions"]) and benchmarks["machine"]
    for row in rows.values():
        assert row["low"] <= row["ratio"] <= row["high"] and row["repeats"] >= 1
        assert (ROOT / row["command"].split()[1]).is_file()


def test_the_families_are_counted() -> None:
    for file in ("README.md", "CHANGELOG.md"):
        assert re.findall(r"(\d+)(?: captured)? families", (ROOT / file).read_text()) == [str(len(FAMILIES))], file
