"""The report on runs that were made up: every number can be told beforehand."""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kv_trainer.experiments.compare import print_study
from kv_trainer.experiments.contribution import Game
from kv_trainer.experiments.experiment import Unequal, load_experiment
from kv_trainer.experiments.fairness import agreement, check_budget, violations
from kv_trainer.experiments.figures.curves import draw_curves
from kv_trainer.experiments.jobs import Job, equal_steps, given_seconds
from kv_trainer.experiments.reach import reached, trailing
from kv_trainer.experiments.report import write_report
from kv_trainer.experiments.results import Items, Study, study_of
from kv_trainer.experiments.statistics import bootstrap
from kv_trainer.experiments.words import finding_of, steps_of_timed

EXPERIMENT = """recipe: r.yaml
output_dir: out
seeds: [1, 2, 3]
arms:
  ce: {}
  timed: {like: ce, seconds_of: taught}
  taught: {}
  control: {control: true}
"""
HITS = {"ce": 1, "timed": 2, "taught": 8, "control": 2}  # of ten rows, and one more for each seed after the first
STEPS = 40


def write_run(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """predictions, metrics.jsonl and routing of a run; its record."""
    folder.mkdir(parents=True)
    hits = HITS[arm] + (seed == (2 if arm == "ce" else 3))
    rows = [
        {"row": i, "task": "odd" if i % 2 else "even", "prediction": "1", "reference": "1", "hit": i < hits,
         "nll": 10.0 / (1 + hits) + 0.1 * (i % 3), "tokens": 10}
        for i in range(10)
    ]  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logs = []
    for step in range(4, STEPS + 1, 4):
        ce = 4.0 - (3.9 if arm == "taught" else 2.0) * step / STEPS + 0.05 * seed
        log = {"step": step, "loss": ce, "loss_cross_entropy": ce, "weight_cross_entropy": 1.0}
        if arm in ("taught", "control"):
            log |= {"loss_kv_relation": 2.0 - step / STEPS, "weight_kv_relation": 3.0}
        logs.append(log)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    if arm == "taught":
        routing = {"teachers": ["a", "b"], "tasks": ["even", "odd"], "layer": [[0.5, 0.5], [0.5, 0.5]],
                   "task": [[0.9, 0.1], [0.2, 0.8]]}  # fmt: skip
        (folder / "routing.json").write_text(json.dumps(routing))
    pace = 3.0 if arm in ("taught", "control") else 1.0
    right = [row["hit"] for row in rows]
    metrics = {"loss": 1.0, "perplexity": 2.7, "accuracy": sum(right) / 10, "accuracy_even": sum(right[::2]) / 5,
               "accuracy_odd": sum(right[1::2]) / 5, "accuracy_macro": sum(right) / 10}  # fmt: skip
    return {
        "steps": STEPS, "samples": 80, "tokens": 400, "seconds": pace * STEPS, "order": "o", "initial": f"i{seed}",
        "train_rows": "t", "eval_rows": "e", "shared_prompts": 0, "cross_entropy": {"weight": 1.0}, "metrics": metrics,
        "clock": [pace * (i + 1) for i in range(STEPS)], "machine": "a machine", "threads": "1",
    }  # fmt: skip


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("x")
    Path("e.yaml").write_text(EXPERIMENT)
    experiment = load_experiment("e.yaml")
    records = {(a, s): write_run(Path("out") / f"{a}-{s}", a, s) for a in experiment.arms for s in (1, 2, 3)}
    recipe = {"teachers": {}, "training": {"output_dir": ""}, "losses": {"cross_entropy": {}}, "fusion": 0,
              "alignment": 0, "projector": 0}  # fmt: skip
    monkeypatch.setattr(Job, "recipe_text", lambda self, steps=None: json.dumps(recipe))
    monkeypatch.setattr("kv_trainer.experiments.figures.load_recipe", lambda *a: SimpleNamespace(teachers={}))
    monkeypatch.setattr("kv_trainer.experiments.results.bootstrap", partial(bootstrap, resamples=200))
    monkeypatch.setattr("kv_trainer.experiments.figures.logger.warning", lambda *told, **_: pytest.fail(str(told)))
    return study_of(experiment, list(experiment.arms), [1, 2, 3], records)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_trainer.experiments.report.draw_all", lambda study, folder: {})


def test_results_have_what_others_read(study: Study, no_pictures: None) -> None:
    write_report(study, Path("out/report"))
    found = json.loads(Path("out/report/results.json").read_text())
    assert found["arms"]["taught"]["accuracy"] == [0.8, 0.8, 0.9] and found["seeds"] == [1, 2, 3]
    assert found["arms"]["taught"]["accuracy_macro"] == pytest.approx([0.8, 0.8, 0.9])
    assert found["budget"]["taught"] == {"steps": 40, "tokens": 400, "seconds": 120}
    one = next(c for c in found["comparisons"] if c["arm"] == "taught" and c["metric"] == "accuracy")
    assert (one["against"], one["verdict"]) == ("ce", "keep")
    assert one["difference"] == pytest.approx(0.7)
    assert one["low"] < 0.7 < one["high"]
    assert {c["verdict"] for c in found["comparisons"] if c["metric"] == "perplexity"} == {"not judged"}
    assert [f["arm"] for f in found["fairness"]] == ["timed"], "a third of the seconds is not as long"
    assert found["left_out"] == [] and found["reached"]["taught"]["steps"] == [24, 24, 24]


def test_what_each_teacher_brings_is_told_in_numbers(
    study: Study, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worth = {"": [0.0, 0.0], "a": [0.5, 0.4], "b": [0.3, 0.2], "ab": [0.9, 0.8]}
    game = Game(["a", "b"], {frozenset(team): values for team, values in worth.items()}, "taught")
    monkeypatch.setattr("kv_trainer.experiments.report.find_games", lambda study: [game])
    write_report(study, Path("out/report"))
    shapley, lost = json.loads(Path("out/report/results.json").read_text())["contributions"]
    assert (shapley["kind"], shapley["to"], shapley["measure"]) == ("teacher", "taught", "Shapley value")
    assert shapley["values"]["a"] == pytest.approx([0.55, 0.5]) and lost["values"]["b"] == pytest.approx([0.4, 0.4])
    text = Path("out/report/report.md").read_text()
    assert "| a | taught | Shapley value | +52.5 ± 3.5 points |" in text
    assert "| b | taught | lost without it | +40.0 ± 0.0 points |" in text


def test_the_report_is_whole_and_stands_alone(study: Study) -> None:
    folder = Path("out/report")
    write_report(study, folder)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for title in ("Findings", "Arms", "Comparisons", "Fairness", "Figures", "Rule", "Commands", "Versions"):
        assert f"## {title}" in text and f"<h2>{title}" in page
    assert "taught: accuracy 83.3%, +70.0 points from ce" in text and "Verdict: keep." in text
    assert "Control: 14% of the gain of taught, the best arm" in text
    assert "timed was given the seconds of taught with the same seed, at the pace of ce: 40, 40, 40 steps. " in text
    assert "It took 33%, 33%, 33% of them." in text and "NOT FAIR: timed: took 33% (seed 1), 33% (seed 2)" in text
    assert "OMP_NUM_THREADS=1 kv-trainer train r.yaml --training.seed 1 --training.output_dir out/ce-1" in text
    pictures = sorted(path.name for path in (folder / "figures").iterdir())
    assert pictures == ["arms.png", "curves.png", "reached.png", "routing_task_taught.png", "terms.png"]
    assert all(f"figures/{name}" in text for name in pictures)
    assert page.count("data:image/png;base64,") == len(pictures) and not re.search(r'(src|href)="(?!data:)', page)
    assert (folder / "commands.sh").read_text().count("kv-trainer train") == 12
    assert "ce-1-again" in (folder / "commands.sh").read_text(), "finished runs are not trained into"


def test_what_is_not_fair_is_loud(study: Study, no_pictures: None) -> None:
    study.records["taught", 2]["tokens"] = 399
    study.records["control", 1]["shared_prompts"] = 3
    write_report(study, Path("out/report"))
    text = Path("out/report/report.md").read_text()
    told = "supervised tokens differ from those of ce (399 and 400), seed 2"
    assert f"**NOT FAIR: taught: {told}.**" in text and "differ in taught" in text
    assert "| weights of each teacher | not recorded by the version that made the runs |" in text
    verdicts = {(c.arm, c.against): c.verdict for c in study.judged}
    assert [verdicts[arm, "ce"] for arm in ("timed", "taught", "control")] == ["none: not fair"] * 2 + ["control"]
    assert "**NOT FAIR: control: 3 evaluation rows have a prompt that is trained on.**" in text
    shown = io.StringIO()
    print_study(Console(file=shown, width=160), study, Path("out/report"))
    assert f"NOT FAIR: taught: {told}" in shown.getvalue()


def test_what_may_differ(study: Study) -> None:
    """The steps of an arm that has another's seconds; anything the file allows, which is still shown."""
    experiment, records = study.experiment, study.records
    for seed in study.seeds:
        records["timed", seed] |= {"steps": 99, "tokens": 1, "samples": 2, "order": "x"}
        records["timed", seed]["seconds"] = 1.09 * records["taught", seed]["seconds"]
    assert check_budget(experiment, study.arms, study.seeds, records) == []
    records["timed", 1] |= {"initial": "another", "cross_entropy": "another"}
    told = violations(check_budget(experiment, study.arms, study.seeds, records))
    assert [f.words.split(" differ")[0] for f in told] == ["first weights of the student", "cross-entropy term"]
    experiment.arms["timed"].unequal = Unequal(["initial"], "for a reason")
    found = check_budget(experiment, study.arms, study.seeds, records)
    assert [f.allowed for f in found] == ["for a reason", None], "what is not named is not allowed"
    with pytest.raises(ValueError, match="unequal.what names 'eval_rows'.*It may be steps, samples"):
        Unequal(["eval_rows"], "no")


def test_every_pair_is_checked_and_an_arm_of_given_seconds_by_the_arm_whose_they_are(study: Study) -> None:
    experiment, records, arms = study.experiment, study.records, study.experiment.arms
    for seed in study.seeds:
        records["timed", seed] |= {"steps": 99, "seconds": records["taught", seed]["seconds"]}
        records["control", seed]["steps"] = 80
    arms["control"].against = "timed"
    words = "optimizer steps differ from those of taught, whose seconds timed was given, (80 and 40), seeds 1, 2, 3"
    assert [(f.arm, f.words) for f in study.findings] == [("control", words)]
    arms["control"].against, arms["taught"].also_against = "control", ["control"]
    found = check_budget(experiment, study.arms, study.seeds, records)
    assert [(f.arm, f.words.split(" differ from ")[1]) for f in found] == [
        ("taught", "those of control (40 and 80), seeds 1, 2, 3")
    ]
    arms["control"].unequal = Unequal(["steps"], "more steps\nare what is studied")
    allowed = check_budget(experiment, study.arms, study.seeds, records)
    assert [f.allowed for f in allowed] == ["more steps are what is studied"], "either arm of a pair may say so"
    told = dict(agreement(experiment, study.arms, study.seeds, [], records))
    assert told["optimizer steps"] == "the same in arms that are compared, but for timed (another arm's seconds)"
    assert told["evaluation rows"] == "the same in all arms"


def test_an_allowance_is_of_the_arm_that_has_it(study: Study) -> None:
    """A student of another size is compared with one of that size; that one's size excuses no third."""
    experiment, records, arms = study.experiment, study.records, study.experiment.arms
    for seed in study.seeds:
        records["timed", seed]["seconds"] = records["taught", seed]["seconds"]
        records["control", seed]["initial"] = "small"
    arms["control"].unequal = Unequal(["initial"], "the size is studied")
    arms["taught"].against = "control"
    assert [(f.arm, f.against, f.allowed) for f in study.findings] == [
        ("taught", "control", "the size is studied"), ("control", "ce", "the size is studied"),
    ], "taught is as ce, which control is compared with"  # fmt: skip
    for seed in study.seeds:
        records["taught", seed]["initial"] = "large"
    found = violations(check_budget(experiment, study.arms, study.seeds, records))
    assert [(f.arm, f.against) for f in found] == [("taught", "control")]
    assert found[0].concerns("taught", "control") and not found[0].concerns("control", "ce")


def test_what_was_not_recorded_is_not_the_same(study: Study) -> None:
    for record in study.records.values():
        del record["initial"]
    study.records["ce", 1].pop("order")
    told = dict(agreement(study.experiment, study.arms, study.seeds, study.findings, study.records))
    assert told["first weights of the student"] == "not recorded by the version that made the runs"
    assert told["order of rows"] == "the same in the 8 runs that recorded it"
    assert told["processor"] == "not recorded by the version that made the runs"
    study.records["ce", 1]["cpu"] = study.records["taught", 1]["cpu"] = "one"
    told = dict(agreement(study.experiment, study.arms, study.seeds, study.findings, study.records))
    assert told["processor"] == "2 of 12 runs recorded it; among those the same in all runs"


def test_other_settings_of_training_are_shown(study: Study) -> None:
    study.experiment.arms["taught"].set = {"training.learning_rate": 1e-3, "training": {"optim": "sgd", "max_steps": 9}}
    told = dict(agreement(study.experiment, study.arms, study.seeds, study.findings, study.records))
    assert told["settings of training"] == "taught and ce differ in learning_rate, optim"


def test_a_store_counts_where_its_seconds_are_given_too(study: Study) -> None:
    arms = study.experiment.arms
    arms["timed"].with_store = True
    with pytest.raises(ValueError, match="arms.timed.with_store: taught read no store, or one whose filling nobody"):
        given_seconds(study.experiment, "timed", 1, study.records)
    for seed in study.seeds:
        study.records["taught", seed]["pass_seconds"] = {"wall": 80.0, "processor": 1.0}
        study.records["timed", seed]["seconds"] = 200.0
    assert given_seconds(study.experiment, "timed", 1, study.records) == 200.0
    assert equal_steps(Job(study.experiment, "timed", 1), study.records) == 200
    assert study.findings == []
    assert "seconds of taught and of filling its store, with the same" in steps_of_timed(study)[0]
    assert "It took 100%, 100%, 100% of them." in steps_of_timed(study)[0]


def test_where_runs_were_made_is_told(study: Study, no_pictures: None) -> None:
    def made() -> tuple[str, str]:
        told = dict(agreement(study.experiment, study.arms, study.seeds, [], study.records))
        return told["machine and threads"], told["code of this package, by a hash"]

    assert made() == ("the same in all runs",) * 2
    for arm in study.arms:
        study.records[arm, 2]["code"] = "abc"
    assert made() == ("the same in all runs", "the same in all arms of a seed, but not in all seeds")
    for seed in study.seeds:
        study.records["timed", seed]["seconds"] = study.records["taught", seed]["seconds"]
    study.records["taught", 1]["machine"] = "another"
    assert made()[0] == "differ between runs, see the end"
    assert [f.words for f in study.findings] == ["its seconds are of another machine than those of taught, seed 1"]
    study.records["taught", 2]["cpu"] = "one"
    assert len(check_budget(study.experiment, study.arms, study.seeds, study.records)) == 1, "one of them is not known"
    study.records["timed", 2]["cpu"] = "another"
    found = check_budget(study.experiment, study.arms, study.seeds, study.records)
    assert [f.words for f in found] == ["its seconds are of another machine than those of taught, seeds 1, 2"]
    for arm, seed in (("taught", 2), ("timed", 2)):
        del study.records[arm, seed]["cpu"]
    write_report(study, Path("out/report"))
    text = Path("out/report/report.md").read_text()
    assert "- another: taught-1\n" in text and "- a machine, code abc: ce-2, timed-2, taught-2, control-2\n" in text


def test_a_picture_that_fails_costs_no_numbers(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("kv_trainer.experiments.figures.logger.warning", lambda text, *of, **_: told.append(text % of))
    monkeypatch.setattr("kv_trainer.experiments.figures.draw_curves", lambda *a: 1 / 0)
    write_report(study, Path("out/report"))
    assert told == ["A picture is missing from the report, training: ZeroDivisionError('division by zero')"]
    text = Path("out/report/report.md").read_text()
    assert "figures/arms.png" in text and "figures/terms.png" in text and "figures/curves.png" not in text


def test_a_run_that_diverged_is_reported(study: Study) -> None:
    study.experiment.metrics = ["perplexity"]
    study.records["taught", 1]["metrics"]["perplexity"] = float("inf")
    study.records["control", 2]["metrics"]["perplexity"] = float("nan")
    write_report(study, Path("out/report"))
    text = Path("out/report/report.md").read_text()
    assert text.count("none: a value is not finite") >= 2 and (Path("out/report/figures/arms.png")).exists()


def test_any_name_of_a_task_and_of_an_arm_can_be_drawn(study: Study) -> None:
    for path in Path("out").glob("*/predictions.jsonl"):
        path.write_text(path.read_text().replace("even", "$\\\\frac$"))
    for record in study.records.values():
        record["metrics"]["accuracy_$\\frac$"] = record["metrics"].pop("accuracy_even")
    long = "a" * 70
    study.experiment.arms[long] = study.experiment.arms.pop("control")
    study.arms[-1] = long
    for seed in study.seeds:
        study.records[long, seed] = study.records["control", seed]
        Path(f"out/control-{seed}").rename(f"out/{long}-{seed}")
    write_report(study, Path("out/report"))
    assert "$\\frac$" in Path("out/report/report.md").read_text()


def test_the_curves_show_each_kind_of_term(study: Study, tmp_path: Path) -> None:
    """Not the first alone: the arms of the other would have no line."""
    for seed in study.seeds:
        log = study.folder("control", seed) / "metrics.jsonl"
        log.write_text(log.read_text().replace("kv_relation", "kv"))
    caption = draw_curves(study, tmp_path / "curves.png")
    assert "kv_relation term (unweighted), kv term (unweighted), training cross-entropy" in caption


def test_few_rows_with_answers_make_an_interval_or_no_verdict_to_keep(study: Study) -> None:
    """A resample without any of them would have no value, and so no interval where the rule asks for one."""
    for path in Path("out").glob("*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[3:]:
            row["hit"] = None
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    low, high = study.interval("accuracy", "taught", "ce")
    assert low < high
    assert [len(s) for s in study.items("taught").strata("accuracy")] == [3]
    assert [len(s) for s in study.items("taught").strata("accuracy_macro")] == [2, 1]
    assert study.interval("accuracy_macro", "taught", "ce") is None, "of one row nothing can be drawn"


def test_a_task_without_answers_has_no_part_in_the_mean_over_tasks(study: Study) -> None:
    for path in Path("out").glob("*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows[1::2]:
            row["hit"] = None
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = study.items("taught")
    every = list(range(10))
    assert items.value("accuracy_macro", [0], every) == items.value("accuracy", [0], every) == 0.8
    assert [len(s) for s in items.strata("accuracy_macro")] == [5]


def test_a_report_that_cannot_be_made_leaves_the_older_one(study: Study) -> None:
    figures = Path("out/report/figures")
    figures.mkdir(parents=True)
    (figures / "arms.png").write_bytes(b"older")
    study.experiment.metrics = ["accuracy_nothing"]
    with pytest.raises(ValueError, match="metrics names 'accuracy_nothing'"):
        write_report(study, Path("out/report"))
    assert [(p.name, p.read_bytes()) for p in figures.iterdir()] == [("arms.png", b"older")]


def test_two_models_in_folders_of_one_name_are_two(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"taught": "a/final", "control": "b/final"}

    def recipe(job: Job, steps: int | None = None) -> str:
        return json.dumps({"teachers": {"math": {"model": places.get(job.arm)}}})

    for (arm, _), record in study.records.items():
        record["teachers"] = {"math": ["final", places[arm]]} if arm in places else {}
    monkeypatch.setattr(Job, "recipe_text", recipe)
    arms = list(study.arms)
    assert not [f for f in check_budget(study.experiment, arms, study.seeds, study.records) if "weights" in f.words]
    places["control"] = places["taught"]
    found = [f.words for f in check_budget(study.experiment, arms, study.seeds, study.records) if "weights" in f.words]
    assert found == ["the weights of math are not those of taught-1, seed 3"]


def test_a_damaged_file_of_a_run_is_named(study: Study) -> None:
    path = Path("out/taught-2/predictions.jsonl")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="out/taught-2/predictions.jsonl is damaged"):
        study.items("taught")


def test_files_that_changed_between_runs_are_seen(study: Study) -> None:
    """The same recipe, but rows or a teacher made anew under the same name after the first seed."""
    records, names = study.records, ["ce", "taught", "control"]
    for arm in names:
        for seed in study.seeds:
            records[arm, seed]["teachers"] = {} if arm == "ce" else {"math": ["big", "w1"]}
            records[arm, seed] |= {"train_rows": f"t{seed > 1}", "eval_rows": "e"}
    words = [f.words for f in check_budget(study.experiment, names, study.seeds, records)]
    assert words == ["training rows and labels of seed 2, 3 differ from those of seed 1"] * 3
    for seed in study.seeds:
        for arm in names:
            records[arm, seed]["train_rows"] = "t"
    told = dict(agreement(study.experiment, study.arms, [1], [], records))
    assert told["weights of each teacher"] == "the same in the 3 runs that recorded it"
    records["control", 3]["teachers"] = {"math": ["big", "w2"]}
    assert [(f.arm, f.words) for f in violations(check_budget(study.experiment, names, study.seeds, records))] == [
        ("control", "the weights of math are not those of taught-1, seed 3")
    ]
    records["control", 3]["teachers"] = {"math": ["another", "w2"]}
    assert check_budget(study.experiment, names, study.seeds, records) == [], "another model is another teacher"


def test_an_arm_may_be_tested_against_several_others(study: Study) -> None:
    study.experiment.arms["taught"].also_against = ["timed", "control"]
    pairs = [(c.arm, c.against) for c in study.judged]
    assert pairs == [("timed", "ce"), ("taught", "ce"), ("control", "ce"), ("taught", "timed"), ("taught", "control")]
    assert study.first("taught").against == "ce" and study.first("ce") is None
    assert study.judged[2].verdict == "control" and study.judged[4].verdict.startswith("none: the seeds do not differ")
    said = [finding_of(study, one) for one in study.judged]
    assert "Control: 14% of the gain of taught" in said[2] and "+60.0 points from control" in said[4]


def test_what_the_file_has_beyond_the_report_is_named(study: Study, no_pictures: None) -> None:
    study.experiment.seeds = [1, 2, 3, 4, 5]
    some = study_of(study.experiment, ["ce", "taught"], [1, 2, 3], study.records)
    some.records["taught", 1]["selected"] = True
    write_report(some, Path("out/report"))
    text = Path("out/report/report.md").read_text()
    assert "**Of the experiment, the arms timed, control and the seeds 4, 5 are not in this report.**" in text
    assert "**taught: each keeps the checkpoint, or stops, by the evaluation rows that are reported" in text


def test_an_arm_may_have_another_to_be_compared_with(study: Study) -> None:
    study.experiment.arms["control"].against = "taught"
    study.records["control", 1]["order"] = study.records["taught", 1]["order"] = "another"
    one = next(c for c in study.judged if c.arm == "control")
    assert one.against == "taught" and one.difference == pytest.approx(-0.6)
    assert {f.arm for f in study.findings} == {"timed", "taught"}, "equal to its own"
    shown = io.StringIO()
    print_study(Console(file=shown, width=160), study, Path("out/report"))
    rows = {line.split()[0]: line.split() for line in shown.getvalue().splitlines() if line.strip()}
    assert rows["arm"][2:4] == ["difference", "95%"] and rows["control"][2] == "-60.0"
    assert rows["control"][-1] == "taught" and rows["taught"][-1] == "ce"


def test_a_control_is_measured_against_an_arm_with_its_own_baseline(study: Study) -> None:
    """Not against what a larger student, or more steps, gain over something else."""
    experiment = study.experiment
    experiment.arms["taught"].against = "timed"
    apart = study_of(experiment, study.arms, study.seeds, study.records)
    assert "Control: no other arm has a gain" in finding_of(apart, apart.first("control"))
    experiment.arms["taught"].against, experiment.arms["taught"].unequal = None, Unequal(["initial"], "its size")
    larger = study_of(experiment, study.arms, study.seeds, study.records)
    assert "Control: no other arm has a gain" in finding_of(larger, larger.first("control"))


def test_two_seeds_are_no_verdict(study: Study, no_pictures: None) -> None:
    few = study_of(study.experiment, study.arms, [1, 2], study.records)
    write_report(few, Path("out/report"))
    text = Path("out/report/report.md").read_text()
    assert "none: fewer than 3 seeds" in text and "**2 seeds: no verdict is given for fewer than 3.**" in text
    write_report(study_of(study.experiment, study.arms, [1], study.records), Path("out/one"))
    alone = Path("out/one/report.md").read_text()
    assert "**1 seed: no verdict" in alone and "±" not in alone.partition("## Comparisons")[0].partition("| arm |")[2]


def test_what_is_not_finished_is_left_out_and_named(study: Study) -> None:
    records = dict(study.records)
    del records["taught", 3]
    for seed in study.seeds:
        del records["control", seed]
    part = study_of(study.experiment, study.arms, [1, 2, 3], records)
    assert part.arms == ["ce", "timed", "taught"] and part.seeds == [1, 2]
    assert part.missing == ["taught-3", "control-1", "control-2", "control-3"]
    records = {key: record for key, record in study.records.items() if key[0] != "taught"}
    part = study_of(study.experiment, study.arms, [1, 2, 3], records)
    assert part.arms == ["ce", "control"], "timed was given the seconds of taught, which nobody knows"
    with pytest.raises(ValueError, match="ce among them"):
        study_of(study.experiment, study.arms, [1, 2, 3], {k: v for k, v in records.items() if k[0] != "ce"})


def test_an_unknown_metric_is_refused(study: Study) -> None:
    study.experiment.metrics = ["acuracy"]
    with pytest.raises(ValueError, match="'acuracy', which the runs of ce do not have; known: loss, perplexity"):
        _ = study.comparisons


def test_items_give_the_metrics(study: Study) -> None:
    items = study.items("taught")
    assert isinstance(items, Items)
    every = [0, 1, 2], slice(None)
    for metric in ("accuracy", "accuracy_even", "accuracy_macro"):
        assert items.value(metric, *every) == pytest.approx(sum(study.values["taught"][metric]) / 3)
    low, high = study.interval("perplexity", "taught", "ce")
    assert low < high < 0, "lower than that of ce"


def test_when_a_loss_is_reached(study: Study) -> None:
    found = reached(study)
    assert found.each["ce"]["steps"] == [40, 40, 40] and found.each["taught"]["steps"] == [24, 24, 24]
    assert found.each["taught"]["seconds"] == [72.0, 72.0, 72.0]
    assert found.means("steps")["control"] == 40
    assert trailing([4.0, 2.0, 6.0]) == [4.0, 2.0, 6.0] and trailing([3.0] * 49 + [8.0])[-1] == 4.0
