"""recipes/reasoning_gym: rows without leaks whose answers are found, and recipes that run on them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from kv_trainer.cli import main
from kv_trainer.metrics import extract_answer, reference_answer
from kv_trainer.recipes import load_recipe
from kv_trainer.run import evaluate

pytest.importorskip("reasoning_gym", reason="the rows of recipes/reasoning_gym need pip install 'kv_trainer[smollm2]'")
FOLDER = Path(__file__).parent.parent / "recipes" / "reasoning_gym"
ROWS = {"test": 2, "dev": 1, "train": 3}


@pytest.fixture(scope="module")
def prepare(tmp_path_factory) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_reasoning_gym", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Never the one that somebody fetched: tests write beside links to it.
    module.TEACHER = tmp_path_factory.mktemp("smollm2") / "absent"
    return module


@pytest.fixture(scope="module")
def folder(prepare, tmp_path_factory) -> Path:
    """The recipes beside a small version of their data, and their student without a teacher."""
    folder = tmp_path_factory.mktemp("reasoning_gym")
    for recipe in FOLDER.glob("*.yaml"):
        shutil.copy(recipe, folder)
    prepare.write_data(folder, ROWS)
    prepare.place_models(folder)
    return folder


@pytest.fixture(scope="module")
def splits(folder) -> dict[str, list[dict[str, str]]]:
    return {name: [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").open()] for name in ROWS}


def test_every_family_is_in_every_split_and_no_question_in_two(prepare, splits) -> None:
    assert len(prepare.FAMILIES) >= 7
    for name, rows in splits.items():
        assert sorted(row["task"] for row in rows) == sorted(list(prepare.FAMILIES) * ROWS[name])
    hashes = [prepare.question_hash(row) for rows in splits.values() for row in rows]
    assert len(set(hashes)) == len(hashes)


def test_the_same_question_in_another_order_is_a_repeat(prepare) -> None:
    ask = "Find the GCD of these numbers: {}, {}."
    one, other, third = ({"task": "gcd", "prompt": ask.format(*pair)} for pair in ((12, 18), (18, 12), (12, 19)))
    assert prepare.question_hash(one) == prepare.question_hash(other) != prepare.question_hash(third)


def test_rows_are_what_the_seed_gives(prepare, splits) -> None:
    assert prepare.make_splits(ROWS) == splits


def test_a_family_that_runs_out_says_so(prepare, monkeypatch) -> None:
    tiny = {"max_terms": 2, "min_digits": 1, "max_digits": 1}
    monkeypatch.setitem(prepare.FAMILIES, "chain_sum", tiny)
    with pytest.raises(SystemExit, match="chain_sum has no more than"):
        list(prepare.unique_rows("chain_sum"))


@pytest.mark.parametrize("rule", ["gsm8k", "auto", r"####\s*(.+)"])
def test_a_right_completion_is_right_by_every_rule_that_fits(prepare, rule: str) -> None:
    for row in (row for rows in prepare.make_splits({"test": 30}).values() for row in rows):
        assert extract_answer(row["completion"], rule) == reference_answer(row["answer"], rule), row


def test_the_recipes_validate(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["validate", "evaluate.yaml"]) == 0
    assert main(["validate", "train.yaml", "--teachers", "null", "--losses.kv_relation", "null"]) == 0
    args = load_recipe("evaluate.yaml").args
    assert (args.data.eval_split, args.evaluation.answer_pattern) == ("test", "auto")


def test_the_teacher_is_linked_once_it_is_there(prepare, folder, monkeypatch, tmp_path, capsys) -> None:
    for name in ("train.yaml", "evaluate.yaml", "data", "student"):
        (tmp_path / name).symlink_to(folder / name)
    prepare.place_models(tmp_path)
    assert "No teacher: run recipes/smollm2/prepare.py" in capsys.readouterr().out
    (tmp_path / "teacher").symlink_to("nowhere")
    monkeypatch.setattr(prepare, "TEACHER", tmp_path / "fetched")
    shutil.copytree(folder / "student", prepare.TEACHER)
    for _ in range(2):
        prepare.place_models(tmp_path)
        assert (tmp_path / "teacher").resolve() == prepare.TEACHER.resolve()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("train.yaml", ["--teachers.smollm2.chat", "false"])
    assert set(recipe.teachers) == {"smollm2"} and recipe.args.data.eval_split == "validation"


def test_any_model_is_evaluated_by_family(prepare, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    config = LlamaConfig.from_pretrained("student", num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"student/{name}", "model")
    short = ["--evaluation.max_new_tokens", "2", "--training.use_cpu", "true"]
    found = evaluate("model", load_recipe("evaluate.yaml", short))
    expected = {f"eval_accuracy_{family}" for family in (*prepare.FAMILIES, "macro")}
    assert expected | {"eval_accuracy", "eval_loss", "eval_perplexity"} == set(found)
