"""recipes.py: what a recipe may say, and how it is told what is wrong."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from kv_trainer.arguments import FreezeConfig, MultiTeacherKVConfig, ProjectorConfig
from kv_trainer.checks import ignored
from kv_trainer.fusion import FUSIONS, Confidence, Similarity, Uniform
from kv_trainer.losses import LOSSES, GradientShare
from kv_trainer.recipes import NESTED, RecipeError, load_recipe, save_recipe

BASE = """\
student: {model: org/student}
teachers:
  math: {model: org/math}
  code: {model: org/code, dtype: bfloat16}
losses:
  cross_entropy: {weight: 1}
  kv_relation:
    weight: 2
    parts: keys
data: {path: org/rows}
training:
  learning_rate: 5e-5
  seed: 3
"""
ALONE = "student: {model: org/student}\ndata: {path: org/rows}\n"
DEPRECATES = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    return tmp_path


def write(text: str, name: str = "recipes/x.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_whole_recipe() -> None:
    recipe = load_recipe(write(BASE))
    assert recipe.student.model == "org/student"
    assert list(recipe.teachers) == ["math", "code"] and recipe.teachers["code"].dtype == "bfloat16"
    assert isinstance(recipe.args, MultiTeacherKVConfig)
    assert list(recipe.args.losses) == ["cross_entropy", "kv_relation"]
    assert isinstance(recipe.args.losses["kv_relation"], LOSSES["kv_relation"])
    assert recipe.args.losses["kv_relation"].parts == "keys" and recipe.args.losses["kv_relation"].weight == 2
    assert recipe.args.learning_rate == 5e-5 and recipe.args.seed == 3
    assert recipe.args.data.path == "org/rows" and recipe.args.projector == ProjectorConfig()
    assert recipe.path == "recipes/x.yaml"


def test_defaults_of_training() -> None:
    args = load_recipe(write(ALONE)).args
    assert (args.remove_unused_columns, args.report_to, args.logging_steps, args.save_total_limit) == (False, [], 10, 2)
    assert args.ddp_backend is None and list(args.losses) == ["cross_entropy"]
    assert args.output_dir == os.path.join("outputs", "recipes", "x") and not Path("outputs").exists()
    said = load_recipe(write(ALONE + "training: {logging_steps: 500, save_total_limit: null, output_dir: o}")).args
    assert (said.logging_steps, said.save_total_limit, said.output_dir) == (500, None, "o")


def test_every_section_of_the_config_is_a_section_of_the_recipe() -> None:
    ours, theirs = ({f.name for f in dataclasses.fields(c)} for c in (MultiTeacherKVConfig, TrainingArguments))
    assert ours - theirs == set(NESTED)


@pytest.mark.parametrize(
    ("template", "where", "why"),
    [
        ("response: '{a'", "response", "expected '}'"),
        ("answer: '{}'", "answer", "{} names no column"),
        ("teacher_text: {code: '}'}", "teacher_text.code", "Single '}'"),
    ],
)
def test_braces_that_are_no_template(template: str, where: str, why: str) -> None:
    text = f"student: {{model: org/s}}\ndata: {{path: org/d, {template}}}\n"
    assert f"data.{where} in recipes/x.yaml, line 2 is no template: {why}" in error_of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BASE + "alignment:\n  layers:\n    metod: nearest",
            "Unknown key 'alignment.layers.metod' in recipes/x.yaml, line 16. "
            "Did you mean 'method'? Known: method, map.",
        ),
        (
            BASE + "alignement: {}",
            "Unknown key 'alignement' in recipes/x.yaml, line 14. Did you mean 'alignment'? Known:",
        ),
        (
            BASE + "max_steps: 3",
            "Unknown key 'max_steps' in recipes/x.yaml, line 14. Did you mean 'training.max_steps'?",
        ),
        (
            BASE + "  learning_rat: 1",
            "Unknown key 'training.learning_rat' in recipes/x.yaml, line 14. Did you mean 'learning_rate'? "
            "Known: the fields of transformers.TrainingArguments.",
        ),
        (
            BASE + "  fusion: {}",
            "Unknown key 'training.fusion' in recipes/x.yaml, line 14. 'fusion' is a section of its own",
        ),
        (ALONE + "losses: {kv_relations: {}}", "line 3. Did you mean 'kv_relation'? Known: cross_entropy, kv"),
        (BASE.replace("parts", "part"), "Unknown key 'losses.kv_relation.part' in recipes/x.yaml, line 9."),
        (
            BASE.replace("bfloat16", "bf16"),
            "teachers.code.dtype in recipes/x.yaml, line 4 is 'bf16'; give one of float32,",
        ),
        (BASE.replace("dtype", "config"), "Unknown key 'teachers.code.config' in recipes/x.yaml, line 4."),
    ],
)
def test_unknown_keys(text: str, message: str) -> None:
    assert message in error_of(text)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "training: {learning_rate: abc}",
            "training.learning_rate in recipes/x.yaml, line 3 is 'abc' (str); give a float.",
        ),
        ("training: {learning_rate: .nan}", "is nan (float); give a float."),
        ("training: {max_steps: 1.5}", "training.max_steps in recipes/x.yaml, line 3 is 1.5 (float); give an int."),
        ("training: {max_steps: true}", "is True (bool); give an int."),
        ("training: {use_cpu: 1}", "is 1 (int); give true or false."),
        ("training: {seed: null}", "training.seed in recipes/x.yaml, line 3 is null; give an int."),
        ("training: {optim: adamw_torc}", "Did you mean 'adamw_torch'?"),
        ("training: {save_strategy: step}", "give one of 'no', 'steps', 'epoch', 'best'. Did you mean 'steps'?"),
        ("training: [1]", "training in recipes/x.yaml, line 3 is [1] (list); give a mapping"),
        ("training: null", "training in recipes/x.yaml, line 3 is null; give a mapping"),
        ("training:", "training in recipes/x.yaml, line 3 is left empty; write null, or {} for all defaults."),
        ("data: {}", "The key 'data' in recipes/x.yaml, line 3 is there twice (first in line 2); keep one."),
        (
            "evaluation: {batch_size: 1, batch_size: 2}",
            "'evaluation.batch_size' in recipes/x.yaml, line 3 is there twice;",
        ),
        ("on: 1", "The key True in recipes/x.yaml, line 3 is not text (bool); put it in quotes."),
        (
            "control: {shuffle: row}",
            "is 'row' (str); give one of 'rows', 'rows_of_task', 'positions' or null. Did you mean 'rows'?",
        ),
        ("projector: {mlp_ratio: aut}", "is 'aut' (str); give a float or 'auto'. Did you mean 'auto'?"),
        (
            "alignment: {layers: {method: nearst}}",
            "alignment.layers.method in recipes/x.yaml, line 3 is 'nearst' (str); give one of 'relative_depth'",
        ),
        (
            "losses: {cross_entropy: {weight: -1}}",
            "losses.cross_entropy in recipes/x.yaml, line 3: weight is -1; a loss",
        ),
        ("losses: {kv_relation: {}}", "losses in recipes/x.yaml, line 3 lacks cross_entropy; add"),
        ("losses: {cross_entropy: null}", "losses in recipes/x.yaml, line 3 lacks cross_entropy; add"),
        ("losses: {cross_entropy: {}, kv: {}}", "losses.kv in recipes/x.yaml, line 3 needs a teacher; add one under"),
        ("teachers: {model: org/t}", "teachers.model in recipes/x.yaml, line 3 is 'org/t' (str); give a mapping"),
        (
            "teachers: {a.b: {model: t}}",
            "The teacher 'a.b' in recipes/x.yaml, line 3 needs a name of letters, digits, _",
        ),
        ("teachers: {half: {model: t}}", "The teacher 'half' in recipes/x.yaml, line 3 needs another name: torch has"),
        ("teachers: {a: {}}", "teachers.a in recipes/x.yaml, line 3 has no 'model'"),
        ("teachers: {a: {model: t}}", "teachers.a in recipes/x.yaml, line 3 would be ignored: no loss needs a teacher"),
        ("teachers: {a: {model: t, revision: 12}}", "is 12 (int); give a str or null in quotes."),
        (
            "evaluation: {answer_pattern: '('}",
            "evaluation.answer_pattern in recipes/x.yaml, line 3 is no regular expression",
        ),
        ("evaluation: {answer_pattern: 'a'}", "evaluation.answer_pattern in recipes/x.yaml, line 3 has no group"),
        ("evaluation: {answer_pattern: gsm8}", "last_number, auto. Did you mean 'gsm8k'?"),
        ("evaluation: {max_new_tokens: 0}", "max_new_tokens is 0; give 1 or more."),
        ("evaluation: {batch_size: -1}", "batch_size is -1; give 1 or more."),
        ("evaluation: {temperature: 0.5}", "temperature is 0.5, which has no effect without do_sample: true."),
        ("evaluation: {do_sample: true, temperature: 0.0}", "temperature is 0.0; give more than 0, or do_sample"),
        ("evaluation: {do_sample: true, top_p: 1.5}", "top_p is 1.5; give a share above 0 and up to 1"),
        ("evaluation: {do_sample: true, seed: -1}", "seed is -1; give 0 or more."),
        (
            "alignment: {layers: {method: explicit}}",
            "alignment.layers in recipes/x.yaml, line 3: method: explicit and map need each other",
        ),
        ("alignment: {layers: {method: explicit, map: {a: [1]}}}", "line 3 is for a; the teachers are "),
        ("alignment: {layers: {method: explicit, map: {a: [x]}}}", "give a mapping or null."),
        (
            "training: {\n  seed: 1,\n  load_best_model_at_end: true}",
            "training in recipes/x.yaml, line 5: --load_best_model",
        ),
        (
            "training: {dataloader_prefetch_factor: 2}",
            "training in recipes/x.yaml, line 3: --dataloader_prefetch_factor can",
        ),
        ("training: {run_name: 2020-13-45}", "training.run_name in recipes/x.yaml, line 3 is '2020-13-45'"),
        ("control: !!python/object/apply:os.system [ls]", "control in recipes/x.yaml, line 3 has the YAML tag"),
        (
            "control: !!python/name:os.system x",
            "YAML error in recipes/x.yaml, line 3: could not determine a constructor",
        ),
        ("control: {shuffle: rows", "YAML error in recipes/x.yaml, line"),
        ("control: &a {shuffle: *a}", "an alias contains itself"),
    ],
)
def test_errors(section: str, message: str) -> None:
    assert message in error_of(ALONE + section)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("{}", "student in recipes/x.yaml, line 1 has neither 'model' nor 'config'; give one of them."),
        ("{model: a, config: b}", "student in recipes/x.yaml, line 1 has both 'model' and 'config'"),
        ("{config: b}", "student in recipes/x.yaml, line 1 has 'config' but no 'tokenizer'"),
        ("{config: b, tokenizer: b, keep_layers: [0]}", "student.keep_layers in recipes/x.yaml, line 1 needs 'model'"),
        ("{model: a, keep_layers: [0, x]}", "is [0, 'x'] (list); give a list of int or null."),
        ("{model: a, dtype: float23}", "student.dtype in recipes/x.yaml, line 1 is 'float23'; give one of float32,"),
    ],
)
def test_student_errors(student: str, message: str) -> None:
    assert message in error_of(f"student: {student}\ndata: {{path: x}}")


def test_files_that_are_no_recipe(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^The recipe recipes/none.yaml does not exist\.$"):
        load_recipe("recipes/none.yaml")
    with pytest.raises(RecipeError, match="is a folder; name the .yaml file"):
        load_recipe("recipes")
    assert error_of("- a") == "The recipe recipes/x.yaml is a list; give a mapping with student, data, ... in it."
    assert error_of("# nothing") == "Nothing is written in recipes/x.yaml, line 1; give a value."
    assert error_of("a: 1\n\tb: 2").startswith("YAML error in recipes/x.yaml, line 2: found character '\\t'")
    assert error_of("data: {path: x}") == "student is missing in recipes/x.yaml; give student: {model: ...}."
    assert error_of("student: {model: a}").startswith("data in recipes/x.yaml has no 'path'; give a hub name, a folder")
    Path("recipes/x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe("recipes/x.yaml")


def test_evaluation_needs_a_split() -> None:
    text = "student: {model: a}\ndata: {path: x, eval_split: null}\ntraining:\n  eval_strategy: epoch"
    assert "training.eval_strategy in recipes/x.yaml, line 4 needs data to evaluate on" in error_of(text)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_the_old_name_of_checkpointing_works_in_every_version() -> None:
    training = "training: {gradient_checkpointing: true, gradient_checkpointing_kwargs: {use_reentrant: false}}"
    recipe = load_recipe(write(ALONE + training))
    assert recipe.args.gradient_checkpointing is True
    assert recipe.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    save_recipe(recipe, "s.yaml")
    assert load_recipe("s.yaml").args == recipe.args


@pytest.mark.skipif(not DEPRECATES, reason="this version of transformers does not deprecate gradient_checkpointing")
def test_a_deprecated_field_is_a_warning() -> None:
    with pytest.warns(FutureWarning, match="^`gradient_checkpointing` is deprecated"):
        old = load_recipe(write(ALONE + "training:\n  seed: 1\n  gradient_checkpointing: true")).args
    new = load_recipe(write(ALONE + "training: {seed: 1, activation_checkpointing: true}")).args
    assert old.activation_checkpointing is True and old == new


@pytest.mark.parametrize(
    ("section", "field", "expected"),
    [
        ("training: {learning_rate: 1}", "learning_rate", 1.0),
        ("training: {learning_rate: 5e-5}", "learning_rate", 5e-5),
        ("training: {max_grad_norm: .inf}", "max_grad_norm", float("inf")),
        ("training: {eval_strategy: no}", "eval_strategy", "no"),
        (
            "training: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-6},
        ),
        ("training: {report_to: [codecarbon]}", "report_to", ["codecarbon"]),
        ("training: {report_to: codecarbon}", "report_to", ["codecarbon"]),
        ("training: {optim_target_modules: all}", "optim_target_modules", "all"),
        ("training: {accelerator_config: {even_batches: false}}", "accelerator_config.even_batches", False),
        ("training: {run_name: '5e-5'}", "run_name", "5e-5"),
        ("projector: {mlp_ratio: 2}", "projector.mlp_ratio", 2),
        ("projector: {mlp_ratio: auto}", "projector.mlp_ratio", "auto"),
        ("projector: {dropout: 1e-1}", "projector.dropout", 0.1),
        ("data: {path: x, eval_split: null}", "data.eval_split", None),
    ],
)
def test_coercions(section: str, field: str, expected: object) -> None:
    data = "" if section.startswith("data") else "data: {path: x}\n"
    value: object = load_recipe(write("student: {model: a}\n" + data + section)).args
    for name in field.split("."):
        value = getattr(value, name)
    assert value == expected and isinstance(value, type(expected) if not isinstance(expected, float) else (int, float))


def test_anchors_and_merge_keys_work() -> None:
    text = BASE.replace("{model: org/math}", "&t {model: org/math, dtype: float16}")
    text = text.replace("{model: org/code,", "&u {<<: *t,").replace("losses:", "  both: *u\nlosses:")
    teachers = load_recipe(write(text)).teachers
    assert teachers["code"].model == "org/math" and teachers["code"].dtype == "bfloat16"
    assert teachers["both"] == teachers["code"] and teachers["math"].dtype == "float16"


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        (["--training.learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--training.seed=7"], "seed", 7),
        (["--training.output_dir=a=b"], "output_dir", "a=b"),
        (["--control.shuffle", "rows"], "control.shuffle", "rows"),
        (["--evaluation.answer_pattern", "= (.+)"], "evaluation.answer_pattern", "= (.+)"),
        (["--training.max_steps", "-1", "--training.seed", "4"], "seed", 4),
        (["--data.eval_split", "null"], "data.eval_split", None),
    ],
)
def test_overrides(override: list[str], field: str, expected: object) -> None:
    value: object = load_recipe(write(BASE), override).args
    for name in field.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("data.prompt", "{question}", "{question}"),
        ("data.response", "{work}: {answer}", "{work}: {answer}"),
        ("data.response", "#### {answer}", "#### {answer}"),
        ("data.prompt", "'\"{question}\"'", '"{question}"'),
        ("data.prompt", '"{question}\\n"', "{question}\n"),
        ("data.answer", "42", "42"),
        ("data.prompt", "null", None),
    ],
)
def test_templates_on_the_command_line_are_text(key: str, text: str, expected: str | None) -> None:
    recipe = load_recipe(write(BASE), [f"--{key}", text])
    assert getattr(recipe.args.data, key.partition(".")[2]) == expected


def test_overrides_of_losses_and_teachers() -> None:
    losses = load_recipe(write(BASE), ["--losses.kv_relation.weight=3", "--losses.kv", "{metric: l1}"]).args.losses
    assert losses["kv_relation"].weight == 3 and losses["kv_relation"].parts == "keys" and losses["kv"].metric == "l1"
    fewer = ["--losses.kv_relation", "null", "--losses.kv.weight", "1", "--teachers.code=null"]
    less = load_recipe("recipes/x.yaml", fewer)
    assert list(less.args.losses) == ["cross_entropy", "kv"] and list(less.teachers) == ["math"]
    none = load_recipe("recipes/x.yaml", ["--losses.kv_relation", "null", "--teachers", "null"])
    assert none.teachers == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.learning_rate", "x"], "training.learning_rate on the command line is 'x' (str); give a float."),
        (["--training.learnin_rate", "1"], "Unknown key 'training.learnin_rate' on the command line. Did you mean"),
        (["--losses.kv.wait", "1"], "Unknown key 'losses.kv.wait' on the command line. Did you mean 'weight'?"),
        (["--trainin.seed", "1"], "Unknown key 'trainin' on the command line. Did you mean 'training'?"),
        (["--training.seed"], "--training.seed on the command line has no value; write --training.seed value."),
        (["--training.seed", "--training.fp16", "true"], "--training.seed on the command line has no value"),
        (["--training.seed="], "--training.seed: Nothing is written on the command line; give a value."),
        (["--data.prompt="], "--data.prompt: Nothing is written on the command line; give a value."),
        (
            ["--training.seed", "1", "--training.seed=2"],
            "--training.seed on the command line is given twice; keep one.",
        ),
        (["--data", "{path: a, path: b}"], "--data: The key 'path' on the command line is there twice; keep one."),
        (["--data", "{"], "--data: YAML error on the command line"),
        (["seed=1"], "'seed' on the command line is no override; write --section.key value."),
        (["--training..seed=1"], "'--training..seed' on the command line is no override"),
        (["--extends", "./y.yaml"], "'--extends' on the command line is no override"),
        (["--losses.kv_relation.weight", "-1"], "losses.kv_relation on the command line: weight is -1"),
        (["--losses.kv_relation", "null"], "teachers.math in recipes/x.yaml, line 3 would be ignored"),
        (["--projector.mlp_ratio", "-3"], "projector on the command line: mlp_ratio is -3; give a number above 0"),
        (["--projector.dropout", "1"], "projector on the command line: dropout is 1; give a share from 0 up to 1"),
        (["--data.path", "../rows"], "data.path on the command line is '../rows', which leaves its folder"),
        (["--training", "5"], "training on the command line is 5 (int); give a mapping"),
    ],
)
def test_override_errors(overrides: list[str], message: str) -> None:
    assert message in error_of(BASE, *overrides)


def test_paths_beside_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipes/m").mkdir()
    (folder / "recipes/rows.jsonl").touch()
    text = "student: {config: ./m, tokenizer: ./m}\ndata: {path: ./rows.jsonl}\n"
    recipe = load_recipe(write(text))
    assert (recipe.student.config, recipe.student.tokenizer) == ("recipes/m", "recipes/m")
    assert recipe.args.data.path == "recipes/rows.jsonl"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    recipe = load_recipe(folder / "recipes/x.yaml")
    assert recipe.student.config == str(folder / "recipes/m")
    assert load_recipe("../recipes/x.yaml", ["--student.config", str(folder)]).student.config == str(folder)
    monkeypatch.chdir(folder)
    whole = str(folder / "recipes/m")  # as a relative path it would look like a name of the Hub
    assert load_recipe("recipes/x.yaml", ["--student.config", whole]).student.config == whole


def test_a_section_is_switched_off_by_null(folder: Path) -> None:
    text = "student: {model: org/s}\nfreeze: {attention: true, until_step: 5}\nfusion: {method: uniform}\n"
    text += "data: {path: org/rows}\n"
    found = load_recipe(write(text), ["--freeze", "null", "--fusion=null"]).args
    assert found.freeze == FreezeConfig() and found.fusion == Confidence()


def test_other_names_are_left_as_they_are(folder: Path) -> None:
    (folder / "org").mkdir()
    recipe = load_recipe(write("student: {model: org/s, attn_implementation: ./x}\ndata: {path: org}"))
    assert recipe.student.model == "org/s" and recipe.args.data.path == "org"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "./none",
            "data.path in recipes/x.yaml, line 2 is './none', which does not exist (looked for {}/recipes/none)",
        ),
        ("/no/such", "data.path in recipes/x.yaml, line 2 is '/no/such', which does not exist; correct the path."),
        (
            "../rows",
            "data.path in recipes/x.yaml, line 2 is '../rows', which leaves its folder; give an absolute path.",
        ),
        ("./a/../../b", "data.path in recipes/x.yaml, line 2 is './a/../../b', which leaves its folder"),
        ("a/../b", "data.path in recipes/x.yaml, line 2 is 'a/../b', which leaves its folder"),
    ],
)
def test_wrong_paths(value: str, message: str, folder: Path) -> None:
    assert message.format(folder) in error_of(f"student: {{model: a}}\ndata: {{path: {value}}}")


@pytest.mark.parametrize(
    "place", ["student.model", "student.tokenizer", "teachers.math.model", "teachers.math.tokenizer", "data.path"]
)
def test_every_path_is_checked(place: str) -> None:
    message = error_of(BASE, f"--{place}=./none")
    assert message.startswith(f"{place} on the command line is './none', which does not exist")


def test_extends(folder: Path) -> None:
    (folder / "recipes/sub").mkdir()
    (folder / "recipes/sub/m").mkdir()
    write(BASE.replace("org/student", "./m"), "recipes/sub/base.yaml")
    child = "extends: ./sub/base.yaml\nteachers: {code: null}\nlosses: {kv: {}}\ntraining: {seed: 9}\n"
    recipe = load_recipe(write(child))
    assert recipe.student.model == "recipes/sub/m", "./ means beside the file that says it"
    assert list(recipe.teachers) == ["math"] and list(recipe.args.losses) == ["cross_entropy", "kv_relation", "kv"]
    assert recipe.args.seed == 9 and recipe.args.learning_rate == 5e-5
    assert recipe.args.output_dir == os.path.join("outputs", "recipes", "x")
    write("extends: ./x.yaml\ntraining: {seed: 10}", "recipes/y.yaml")
    assert load_recipe("recipes/y.yaml").args.seed == 10
    without = "extends: ./sub/base.yaml\nteachers: null\nlosses: {kv_relation: null}"
    assert load_recipe(write(without)).teachers == {}


def test_extends_errors(folder: Path) -> None:
    write(BASE + "  sed: 1", "recipes/base.yaml")
    assert "Unknown key 'training.sed' in recipes/base.yaml, line 14." in error_of("extends: ./base.yaml")
    write(BASE, "recipes/base.yaml")
    assert "is 'b' (str)" in error_of("extends: ./base.yaml\ntraining: {seed: b}")
    assert "in recipes/x.yaml, line 2" in error_of("extends: ./base.yaml\nstudent: {config: c}")
    assert error_of("extends: base.yaml") == (
        "extends in recipes/x.yaml, line 1 is 'base.yaml'; give a recipe beside this one: ./other.yaml."
    )
    assert "extends in recipes/x.yaml, line 1 is './no.yaml', which does not exist" in error_of("extends: ./no.yaml")
    assert "which leaves its folder" in error_of("extends: ./../x.yaml")
    assert "which leads back to itself" in error_of("extends: ./x.yaml")
    write("extends: ./x.yaml", "recipes/base.yaml")
    circle = "extends in recipes/base.yaml, line 1 is './x.yaml', which leads back to itself; remove one."
    assert error_of("extends: ./base.yaml") == circle


AROUND = """\
freeze: {attention: true, until_step: 500, layer_groups: 3, unfreeze_every: 200, order: bottom_up}
early_stopping: {patience: 3, threshold: 0.01}
accumulation: {steps: [1, 2, 4], at: [0.0, 0.3, 0.6]}
training: {eval_strategy: steps, eval_steps: 5, save_strategy: steps, save_steps: 5, load_best_model_at_end: true}
"""


def test_what_is_around_the_steps_is_read_and_saved() -> None:
    recipe = load_recipe(write(ALONE + AROUND))
    assert recipe.args.freeze.until_step == 500 and recipe.args.freeze.order == "bottom_up"
    assert recipe.args.early_stopping.patience == 3 and recipe.args.accumulation.steps == [1, 2, 4]
    save_recipe(recipe, "s.yaml")
    again = load_recipe("s.yaml").args
    for section in ("freeze", "early_stopping", "accumulation"):
        assert getattr(again, section) == getattr(recipe.args, section)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("freeze: {attention: true}", "freeze in recipes/x.yaml, line 3: attention and until_step need each other"),
        ("freeze: {atention: true}", "Unknown key 'freeze.atention' in recipes/x.yaml, line 3. Did you mean"),
        ("early_stopping: {patience: 3}", "early_stopping in recipes/x.yaml, line 3: early_stopping needs more under"),
        ("accumulation: {steps: [1, 2], at: [0.0]}", "accumulation in recipes/x.yaml, line 3: steps is [1, 2] and at"),
        (
            "accumulation: {steps: [2, 4], at: [0.0, 0.5]}\ntraining: {gradient_accumulation_steps: 8}",
            "accumulation in recipes/x.yaml, line 3: training.gradient_accumulation_steps is 8, but",
        ),
        (
            "training: {gradient_accumulation_steps: 0}",
            "training in recipes/x.yaml, line 3: gradient_accumulation_steps is 0; give 1 or more",
        ),
        ("training: {report_to: [trackio]}", "training.report_to in recipes/x.yaml, line 3 names trackio, which is n"),
        ("training: {num_train_epochs: 0}", "training in recipes/x.yaml, line 3: num_train_epochs is 0: nothing would"),
        (
            "training: {torch_compile: true, torch_compile_backend: inducto}",
            "training.torch_compile_backend in recipes/x.yaml, line 3 is 'inducto'; this torch has",
        ),
        (
            "training: {torch_compile: true, torch_compile_mode: fast}",
            "training.torch_compile_mode in recipes/x.yaml, line 3: Unrecognized mode=fast, should be one of: default",
        ),
        (
            "training: {lr_scheduler_type: warmup_stable_decay}",
            "training.lr_scheduler_type in recipes/x.yaml, line 3 is warmup_stable_decay, which cannot be made with lr",
        ),
        (
            "training: {lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycle: 2}}",
            "training.lr_scheduler_type in recipes/x.yaml, line 3 is cosine, which cannot be made with lr_scheduler_kw",
        ),
        (
            "training: {eval_strategy: steps, eval_steps: 5, metric_for_best_model: acuracy}",
            "training.metric_for_best_model in recipes/x.yaml, line 3 is 'acuracy'; give one of loss, perplexity,",
        ),
        (
            "evaluation: {generate: false}\ntraining: {eval_strategy: epoch, metric_for_best_model: accuracy_sums}",
            "training.metric_for_best_model in recipes/x.yaml, line 4 is 'accuracy_sums', which needs evaluation.gen",
        ),
    ],
)
def test_errors_around_the_steps(text: str, message: str) -> None:
    assert error_of(ALONE + text).startswith(message)


def test_a_schedule_with_what_it_needs_is_taken() -> None:
    text = "training: {lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 5}, max_steps: 9}"
    assert load_recipe(write(ALONE + text)).args.lr_scheduler_kwargs == {"num_decay_steps": 5}


def test_a_quick_run_is_short_and_saves_nothing() -> None:
    args = load_recipe(write(ALONE + AROUND), quick=True).args
    assert (args.max_steps, args.data.max_train_samples, args.data.max_eval_samples) == (20, 128, 32)
    assert (args.save_strategy, args.load_best_model_at_end, args.push_to_hub) == ("no", False, False)
    assert args.output_dir == os.path.join("outputs", "recipes", "x") + "-quick" and args.logging_steps == 5
    assert args.early_stopping.patience is None and args.freeze.until_step == 500


def test_the_command_line_wins_over_the_preset_of_a_quick_run() -> None:
    path = write(ALONE + "training: {output_dir: o/, max_steps: 1000, logging_steps: 2}")
    args = load_recipe(path, quick=True).args
    assert (args.output_dir, args.max_steps, args.logging_steps) == ("o-quick", 20, 2)
    over = ["--training.max_steps", "7", "--data.max_train_samples=500", "--training.output_dir=mine"]
    args = load_recipe(path, over, quick=True).args
    assert (args.output_dir, args.max_steps, args.data.max_train_samples) == ("mine", 7, 500)
    args = load_recipe(path, ["--training.num_train_epochs=2"], quick=True).args
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)


def test_what_is_shorter_than_a_quick_run_stays_so() -> None:
    text = ALONE.replace("org/rows", "org/rows, max_train_samples: 10") + "training: {max_steps: 3}"
    args = load_recipe(write(text), quick=True).args
    assert (args.max_steps, args.data.max_train_samples, args.data.max_eval_samples) == (3, 10, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--teachers.math.weight", "2"], "teachers.math.weight has no effect"),
        (["--projector.dropout", "0.2"], "projector has no effect"),
        (["--losses.kv.weight=1", "--projector.layer_norm=false"], "projector.layer_norm has no effect: it is of"),
        (["--losses.kv.weight=0", "--projector.init=xavier"], "projector has no effect"),
        (["--losses.kv.weight=1", "--projector={method: none, init: xavier}"], "projector.init has no effect: method"),
        (["--losses.kv.weight=1", "--projector={method: none, learning_rate: 0.1}"], "projector.learning_rate has no"),
        (["--evaluation.generate=false", "--evaluation.do_sample=true"], "evaluation.do_sample has no effect"),
        (
            ["--control.shuffle", "rows", "--teachers=null", "--losses.kv_relation=null"],
            "control.shuffle has no effect",
        ),
        (
            ["--losses.kv_relation.attention=student", "--training.max_steps=300"],
            "losses.kv_relation.attention has no effect: it begins at step 1,000, and the run has 300;",
        ),
        (["--fusion.method", "uniform", "--teachers.code=null"], "fusion has no effect: there is one teacher"),
        (
            ["--alignment.layers.method", "nearest", "--teachers=null", "--losses.kv_relation=null"],
            "alignment has no effect: there is no teacher",
        ),
    ],
)
def test_settings_without_effect_are_told(overrides: list[str], message: str) -> None:
    recipe = load_recipe(write(BASE), overrides)
    assert message in " ".join(ignored(recipe.args, {name: t.weight for name, t in recipe.teachers.items()}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_eval_batch_size", "2"),
        ("eval_accumulation_steps", "4"),
        ("bf16_full_eval", "true"),
        ("fp16_full_eval", "true"),
        ("prediction_loss_only", "true"),
    ],
)
def test_trainers_own_settings_of_evaluation_are_told(name: str, value: str) -> None:
    overrides = ["--training.use_cpu", "true", f"--training.{name}", value]
    (said,) = ignored(load_recipe(write(ALONE), overrides).args, {})
    assert said.startswith(f"training.{name} has no effect") and "evaluation.batch_size" in said


def test_a_recipe_without_idle_settings_is_told_nothing() -> None:
    recipe = load_recipe(write(BASE))
    assert ignored(recipe.args, {name: t.weight for name, t in recipe.teachers.items()}) == []


@pytest.mark.parametrize(
    "text",
    [
        ALONE,
        BASE,
        BASE + "  eval_strategy: steps\n  eval_steps: 5\n  lr_scheduler_type: cosine\n  debug: underflow_overflow\n"
        "  accelerator_config: {even_batches: false}\n  report_to: [codecarbon]\n  save_total_limit: null\n"
        "  logging_steps: 500\n  run_name: 'null'\n  use_cpu: true\n  optim_args: '1e-5'\n"
        "  save_strategy: no\n  label_names: []\n  include_num_input_tokens_seen: true\n"
        "projector: {mlp_ratio: 1.5}\nalignment: {layers: {method: explicit, map: {math: [0, 3], code: [1, 2]}}}\n"
        "control: {shuffle: rows}\nfusion: {method: fixed}\n",
        "student: {model: ünï/x, keep_layers: [0, 2], freeze: [embed]}\n"
        "data: {path: x, prompt: \"{q}\\n: \", task: 'no'}\n",
    ],
)
def test_saved_recipe_reads_back_as_equal(text: str) -> None:
    recipe = load_recipe(write(text))
    save_recipe(recipe, "outputs/run/recipe.yaml")
    again = load_recipe("outputs/run/recipe.yaml")
    assert again == dataclasses.replace(recipe, path="outputs/run/recipe.yaml")
    saved = yaml.safe_load(Path("outputs/run/recipe.yaml").read_text(encoding="utf-8"))
    assert set(saved) == {"student", "teachers", "training", *NESTED}
    assert set(saved["losses"]) == set(recipe.args.losses) and "max_length" in saved["data"]
    assert os.listdir("outputs/run") == ["recipe.yaml"], "no temporary file stays"


def test_saved_recipe_holds_only_training_that_differs() -> None:
    save_recipe(load_recipe(write(ALONE + "training: {seed: 5}")), "s.yaml")
    training = yaml.safe_load(Path("s.yaml").read_text())["training"]
    assert training.pop("disable_tqdm", False) in (True, False)  # follows the verbosity of this process
    assert training == {
        "output_dir": os.path.join("outputs", "recipes", "x"),
        "seed": 5,
        "remove_unused_columns": False,
        "report_to": [],
        "logging_steps": 10,
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
    }


# ---- methods with knobs of their own


def test_a_weight_can_be_a_share_of_the_gradient() -> None:
    recipe = load_recipe(write(BASE), ["--losses.kv_relation.weight", "{gradient_share: 0.2, every: 5}"])
    assert recipe.args.losses["kv_relation"].weight == GradientShare(0.2, every=5)
    save_recipe(recipe, "s.yaml")
    assert load_recipe("s.yaml").args.losses == recipe.args.losses
    with pytest.raises(RecipeError, match="Unknown key 'losses.kv_relation.weight.share' on the command line"):
        load_recipe(write(BASE), ["--losses.kv_relation.weight", "{share: 0.2}"])
    with pytest.raises(RecipeError, match="give a mapping of gradient_share, every, smoothing or a float"):
        load_recipe(write(BASE), ["--losses.kv_relation.weight", "much"])


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(write(BASE), ["--fusion.method", name])
    assert recipe.args.fusion == FUSIONS[name]()
    save_recipe(recipe, "s.yaml")
    assert load_recipe("s.yaml").args.fusion == recipe.args.fusion


def test_another_fusion_drops_the_knobs_of_the_first() -> None:
    text = BASE + "fusion: {method: similarity, clusters: 3}\n"
    assert load_recipe(write(text), ["--fusion.clusters", "5"]).args.fusion == Similarity(clusters=5)
    assert load_recipe(write(text), ["--fusion.method", "uniform"]).args.fusion == Uniform()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{method: fixed, temperature: 2}", "Unknown key 'fusion.temperature' .* Known: method; fixed takes no sett"),
        ("{method: ruter}", "fusion.method on the command line is 'ruter'; .* Did you mean 'router'"),
        ("{method: entropy, temperature: 0}", "temperature is 0"),
        ("{method: router, kind: cnn}", "fusion.kind .* give one of 'linear', 'mlp'"),
    ],
)
def test_impossible_fusions_are_refused(value: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(BASE), ["--fusion", value])


@pytest.mark.skipif(not DEPRECATES, reason="this version of transformers does not know activation_checkpointing")
def test_checkpointing_is_saved_under_its_present_name() -> None:
    recipe = load_recipe(write(ALONE + "training: {activation_checkpointing: true}"))
    save_recipe(recipe, "s.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_recipe("s.yaml").args.activation_checkpointing


def test_no_token_is_saved() -> None:
    training = "training: {hub_token: hf_SECRET, fsdp_config: {a: {api_token: hf_SECRET}, b: 1}}"
    recipe = load_recipe(write(ALONE + training))
    assert recipe.args.hub_token == "hf_SECRET"
    save_recipe(recipe, "s.yaml")
    text = Path("s.yaml").read_text()
    assert "SECRET" not in text and "token:" not in text.replace("tokenizer:", "").replace("tokens:", "")
    assert yaml.safe_load(text)["training"]["fsdp_config"].items() >= {"a": {}, "b": 1}.items()


def test_a_failed_save_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write(ALONE))
    Path("s.yaml").write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_recipe(recipe, "s.yaml")
    assert Path("s.yaml").read_text() == "old" and sorted(os.listdir()) == ["recipes", "s.yaml"]
