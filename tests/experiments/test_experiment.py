"""Experiment files: what they mean, and how they are told what is wrong; every shipped one resolves."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_trainer.cli import main
from kv_trainer.experiments.checks import check_arms, describe, twins, without_effect
from kv_trainer.experiments.compare import choose
from kv_trainer.experiments.experiment import is_experiment, load_experiment
from kv_trainer.experiments.jobs import Job, as_word, equal_steps
from kv_trainer.recipe_tree import RecipeError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"
BASE = """recipe: ./r.yaml
seeds: [1, 2, 3, 4]
quick: {seeds: 2, overrides: {training.max_steps: 7}}
overrides: {training.logging_steps: 5}
arms:
  ce: {set: {teachers: null, losses.kv_relation: null}}
  timed: {like: ce, seconds_of: full, set: {training.logging_steps: 2}}
  full: {}
  broken: {set: {control.shuffle: rows}, control: true}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "student: {model: org/s}\nteachers: {a: {model: org/a}, b: {model: org/b}}\ndata: {path: org/d}\n"
        "losses: {cross_entropy: {}, kv_relation: {}}\n"
    )
    Path("e.yaml").write_text(BASE)
    return tmp_path


def test_arms_are_settings_laid_over_each_other() -> None:
    experiment = load_experiment("e.yaml")
    assert experiment.against == "ce" and experiment.recipe == "r.yaml"
    assert experiment.settings("timed") == {"teachers": None, "losses.kv_relation": None, "training.logging_steps": 2}
    assert experiment.settings("full") == {"training.logging_steps": 5}
    words = Job(experiment, "timed", 3).overrides(max_steps=99)
    assert words[:4] == ["--teachers", "null", "--losses.kv_relation", "null"]
    assert words[-6:-4] == ["--training.max_steps", "99"]
    assert words[-4:] == ["--training.seed", "3", "--training.output_dir", f"{experiment.output_dir}/timed-3"]


def test_a_quick_experiment_is_cut_down_and_apart() -> None:
    experiment = load_experiment("e.yaml", quick=True)
    assert experiment.output_dir.endswith("-quick")
    words = Job(experiment, "full", 1).overrides()
    Path("e.yaml").write_text(BASE + "runs_from: [other, runs.zip]\n")
    Path("runs.zip").write_bytes(b"")
    assert load_experiment("e.yaml", quick=True).runs_from == ["other-quick", "runs.zip"]
    assert words[0] == "--quick" and words[words.index("--training.max_steps") + 1] == "7"
    assert "max_steps: 7" in Job(experiment, "full", 1).recipe_text()


def test_what_an_arm_waits_for_comes_with_it() -> None:
    experiment = load_experiment("e.yaml")
    assert experiment.needed(["timed"]) == ["ce", "full", "timed"]
    assert experiment.needed(["broken"]) == ["ce", "broken"]
    experiment.arms["broken"].against = "full"
    assert experiment.needed(["broken"]) == ["ce", "full", "broken"]
    assert Job(experiment, "timed", 2).waits_for == [("ce", 2), ("full", 2)]
    with pytest.raises(ValueError, match="no arm 'brokn'. Did you mean 'broken'"):
        choose(experiment, ["brokn"])


def test_equal_seconds_are_steps_at_the_arm_s_own_pace() -> None:
    experiment = load_experiment("e.yaml")
    records = {("ce", 1): {"seconds": 10.0, "steps": 100}, ("full", 1): {"seconds": 33.0, "steps": 100}}
    assert equal_steps(Job(experiment, "timed", 1), records) == 330
    assert equal_steps(Job(experiment, "full", 1), records) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", "Unknown key 'seed' in e.yaml, line 2. Did you mean 'seeds'?"),
        ("control: true", "controll: true", "Unknown key 'arms.broken.controll' in e.yaml, line 9. Did you mean 'cont"),
        ("seconds_of: full", "seconds_of: ful", "arms.timed.seconds_of in e.yaml, line 7 is 'ful', which is no arm."),
        ("like: ce, ", "", "arms.timed in e.yaml, line 7: seconds_of needs 'like'"),
        ("seconds_of: full", "with_store: true", "arms.timed in e.yaml, line 7: with_store has no effect without"),
        ("like: ce", "like: timed", "leads back to itself"),
        ("./r.yaml", "./no.yaml", "recipe in e.yaml, line 1 is './no.yaml', which does not exist"),
        ("[1, 2, 3, 4]", "[1, 1]", "seeds is [1, 1]; give one or more, each once"),
        ("seeds:", "against: nobody\nseeds:", "against in e.yaml, line 2 is 'nobody', which is no arm"),
        (
            "control: true",
            "control: true, also_against: [broken]",
            "arms.broken.also_against in e.yaml, line 9 names the",
        ),
        (
            "control: true",
            "control: true, against: broken",
            "arms.broken.against in e.yaml, line 9 names the arm itself",
        ),
        ("seeds:", "verdict: {keep: 1, optional: 2}\nseeds:", "give 0 <= optional <= keep"),
        ("[1, 2, 3, 4]", "[-1, 2]", "seeds is [-1, 2]; give numbers from 0 to 4,294,967,295"),
        ("{seeds: 2", "{seeds: 0", "quick in e.yaml, line 3: seeds is 0; give 1 or more"),
        ("seeds:", "metrics: [loss, loss]\nseeds:", "metrics is ['loss', 'loss']; name one or more"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(old: str, new: str, message: str) -> None:
    Path("e.yaml").write_text(BASE.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_experiment("e.yaml")
    assert message in str(caught.value)


def test_an_arm_whose_recipe_is_wrong_is_named_before_anything_runs() -> None:
    Path("e.yaml").write_text(BASE.replace("control.shuffle: rows", "control.shuffle: colums"))
    with pytest.raises(RecipeError, match="broken in e.yaml, line 9: control.shuffle in the experiment .* of .rows"):
        check_arms(load_experiment("e.yaml"))


def test_an_arm_that_its_models_cannot_run_is_named_before_anything_runs() -> None:
    arms = "{deep: {set: {losses.kv_relation.layers: [4, 5]}}, all: {}}"
    Path("e.yaml").write_text(f"recipe: {QUICKSTART / 'two_teachers.yaml'}\nagainst: all\narms: {arms}\n")
    with pytest.raises(ValueError, match="arms.deep in e.yaml, line 3: .*losses.kv_relation.layers is .4, 5.*0 to 4"):
        check_arms(load_experiment("e.yaml"))


def test_arms_that_are_one_and_the_same_are_found() -> None:
    Path("e.yaml").write_text(BASE + "  again: {set: {losses.kv_relation: {}}}\n")
    assert twins(load_experiment("e.yaml")) == [("full", "again")]
    assert describe("e.yaml")[1] == ["full and again are one and the same: their settings do not differ"]


def test_arms_are_judged_in_one_way() -> None:
    """Else the same weights would have several accuracies; a batch's size is nobody's gain."""
    Path("e.yaml").write_text(BASE + "  more: {set: {evaluation.batch_size: 3, evaluation.max_new_tokens: 7}}\n")
    with pytest.raises(ValueError, match="arms.more in e.yaml, line 10 is evaluated in another way than ce .*tokens"):
        check_arms(load_experiment("e.yaml"))
    Path("e.yaml").write_text(BASE + "  more: {set: {evaluation.batch_size: 3}}\n")
    check_arms(load_experiment("e.yaml"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("evaluation.generate: false", "metrics names 'accuracy', but arms.ce has evaluation.generate: false; set it"),
        ("data.eval_split: null", "arms.ce in e.yaml, line 6 has no data.eval_split, so nothing would be measured"),
    ],
)
def test_a_metric_that_no_run_will_have_is_refused_before_they_run(override: str, told: str) -> None:
    Path("e.yaml").write_text(BASE.replace("{training.logging_steps: 5}", f"{{{override}}}"))
    with pytest.raises(ValueError, match=told):
        check_arms(load_experiment("e.yaml"))


def test_runs_are_not_pushed_over_each_other() -> None:
    Path("e.yaml").write_text(BASE.replace("{training.logging_steps: 5}", "{training.push_to_hub: true}"))
    with pytest.raises(ValueError, match="every run, controls too, would be pushed to one repository"):
        check_arms(load_experiment("e.yaml"))


def test_what_does_nothing_in_an_arm_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    one, none = "{teachers.b: null, fusion.temperature: 3}", "{control.shuffle: rows}"
    Path("e.yaml").write_text(f"{BASE}  one: {{set: {one}}}\n  none: {{like: ce, set: {none}}}\n")
    found = without_effect(load_experiment("e.yaml"))
    assert found == [
        "arms.one in e.yaml, line 10: fusion has no effect: there is one teacher.",
        "arms.none in e.yaml, line 11: control.shuffle has no effect: there is no teacher.",
    ]
    assert main(["validate", "e.yaml"]) == 0
    assert f"kv-trainer: warning: e.yaml: {found[0]}" in capsys.readouterr().err
    Path("r.yaml").write_text(Path("r.yaml").read_text() + "fusion: {temperature: 2}\n")
    assert without_effect(load_experiment("e.yaml")) == found, "what the recipe sets is not the arm's"


def test_a_value_that_looks_like_an_option_reaches_the_recipe() -> None:
    Path("e.yaml").write_text(BASE + "  asks: {set: {data.prompt: '--question {prompt}'}}\n")
    job = Job(load_experiment("e.yaml"), "asks", 1)
    assert job.recipe().args.data.prompt == "--question {prompt}" and "'--data.prompt=--question" in job.shown({})


def test_words_of_the_command_line_are_yaml() -> None:
    assert [as_word(x) for x in (None, 3, 0.5, "rows", {"method": "uniform"}, True, [1, 2])] == [
        "null", "3", "0.5", "rows", "{method: uniform}", "true", "[1, 2]",
    ]  # fmt: skip


def test_experiments_are_told_from_recipes() -> None:
    assert is_experiment("e.yaml") and not is_experiment("r.yaml") and not is_experiment("none.yaml")


def test_validate_takes_both(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(BASE.replace("teachers: null", "teachers: 3"))
    assert main(["validate", "e.yaml", "bad.yaml", "r.yaml"]) == 2
    out, err = capsys.readouterr()
    assert "ok e.yaml: 16 runs of r.yaml: ce, timed, full, broken; against ce" in out and "ok r.yaml" in out
    assert "arms.ce in bad.yaml, line 6" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {a: {set: {training.seed: 5}}}", "arms.a sets training.seed, which would be ignored: .* own seeds"),
        ("arms: {a: {set: {training: {seed: 5}}}}", "arms.a sets training.seed, which would be ignored"),
        ("quick: {overrides: {training.seed: 5}}\narms: {a: {}}", "quick.overrides sets training.seed, which would be"),
        ("arms: {a: {set: {training: {hub_token: hf_x}}}}", "arms.a sets training.hub_token, which the report"),
        ("overrides: {training.output_dir: x}\narms: {a: {}}", "overrides sets training.output_dir, .* own output_dir"),
        ("metrics: [acuracy]\narms: {a: {}}", "metrics .*names 'acuracy'. Did you mean 'accuracy'"),
    ],
)
def test_what_would_be_ignored_or_come_too_late_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text("x")
    (tmp_path / "e.yaml").write_text(f"recipe: r.yaml\n{text}")
    with pytest.raises(RecipeError, match=said):
        load_experiment(tmp_path / "e.yaml")


def test_runs_from_nowhere_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("x")
    (tmp_path / "e.yaml").write_text("recipe: r.yaml\narms: {a: {}}")
    assert main(["compare", str(tmp_path / "e.yaml"), "--runs-from", "docs/results/nope/runs.zip"]) == 2
    assert "nope/runs.zip: there is no finished run; give an output_dir, or a runs.zip" in capsys.readouterr().err


def test_a_report_alone_takes_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "e.yaml", "--report-only", "--runs-from", "runs.zip"]) == 2
    assert "leave one out" in capsys.readouterr().err


def test_compare_takes_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "e.yaml", "--training.max_steps", "3"]) == 2
    assert "put them under overrides or arms" in capsys.readouterr().err
    assert main(["compare", "e.yaml", "--report-only"]) == 2
    assert "has no seed of which every begun arm" in capsys.readouterr().err


def test_settings_are_not_for_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(QUICKSTART / "experiment.yaml")
    for command in (["validate", path], ["compare", path]):
        assert main([*command, "--training.seed", "2"]) == 2
        assert "an experiment takes no settings, but got --training.seed 2" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(QUICKSTART.glob("experiment*.yaml")) + sorted(QUICKSTART.glob("*/*.yaml")))
def test_every_shipped_experiment_resolves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(path.relative_to(ROOT))
    check_arms(experiment)
    assert f"# kv-trainer compare {path.relative_to(ROOT)}\n" in Path(path).read_text()


def test_the_main_study_has_the_arms_that_were_promised() -> None:
    assert list(load_experiment(QUICKSTART / "experiment.yaml").arms) == [
        "ce", "ce_equal_time", "logit_kd", "one_teacher_a", "one_teacher_b", "two_uniform", "two_routed",
        "shuffled_rows", "shuffled_rows_of_task", "shuffled_positions", "random_teacher", "ce_half_rate",
        "ce_half_rate_equal_time", "logit_kd_half_rate",
    ]  # fmt: skip
