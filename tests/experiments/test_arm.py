"""What a run records of itself: the same for arms that begin alike, another where anything differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kv_trainer.cli import main
from kv_trainer.evaluation import read_predictions
from kv_trainer.experiments.arm import run
from kv_trainer.experiments.fingerprints import hash_files, hash_inputs, hash_model, hash_weights
from kv_trainer.recipes import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "two_teachers.yaml"
SMALL = {
    "training.max_steps": 4, "training.per_device_train_batch_size": 4, "training.logging_steps": 1,
    "data.max_train_samples": 12, "data.max_eval_samples": 6, "evaluation.max_new_tokens": 4,
    "training.disable_tqdm": True,
}  # fmt: skip
ALONE = {"teachers": None, "losses.kv_relation": None}


def record(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    words = [word for k, v in settings.items() for word in (f"--{k}", "null" if v is None else json.dumps(v))]
    found = run(load_recipe(RECIPE, [*words, "--training.output_dir", str(folder)]))
    assert json.loads((folder / "arm.json").read_text()) == found
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, record(folder, **ALONE)


SAME = ("initial", "train_rows", "eval_rows", "order", "steps", "samples", "tokens", "cross_entropy")


def test_an_arm_with_teachers_begins_as_one_without(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Also with teachers of random weights, which draw from no generator of the run's."""
    random = {"teachers__letters": None, "teachers__chain__random": True}
    taught = record(tmp_path, **random, losses__kv__weight=1)
    assert {name: taught[name] for name in SAME} == {name: plain[1][name] for name in SAME}
    assert taught["steps"] == 4 and taught["samples"] == 16 and taught["shared_prompts"] == 0
    for clock in (taught["clocks"][name] for name in ("wall", "processor")):
        assert len(clock) == 4 and clock == sorted(clock) and clock[0] > 0


def test_what_differs_is_seen(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    other = record(tmp_path, **ALONE, training__seed=2, data__eval_split="train", data__max_train_samples=11)
    assert not any(other[name] == plain[1][name] for name in ("initial", "train_rows", "eval_rows", "order"))
    assert other["shared_prompts"] == 6


def test_files_are_known_by_what_counts_of_them(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert set(plain[1]["inputs"]) == {"student.tokenizer", "student.config", "data.path"}
    teacher, rows = tmp_path / "teacher", tmp_path / "rows"
    shutil.copytree(RECIPE.parent / "teachers" / "chain", teacher)
    rows.mkdir()
    (rows / "train.jsonl").write_text("{}")

    def now() -> list[str]:
        hash_model.cache_clear(), hash_files.cache_clear()
        found = hash_inputs({"teachers": {"a": {"model": str(teacher)}}, "data": {"path": str(rows)}})
        return [found["teachers.a.model"], found["data.path"]]

    first = now()
    (teacher / "README.md").write_text("another")
    (rows / ".cache").write_text("another")
    assert now() == first
    weights = load_file(teacher / "model.safetensors")
    next(iter(weights.values())).mul_(2)
    save_file(weights, teacher / "model.safetensors")
    (rows / "test.jsonl").write_text("{}")
    second = now()
    assert second[0] != first[0] and second[1] != first[1]
    (teacher / "tokenizer.json").write_text("{}")
    assert now()[0] != second[0]


def test_adapters_begin_as_their_base(tiny_model: Any) -> None:
    plain = tiny_model("llama", tie_word_embeddings=True)
    wanted, other = hash_weights(plain), hash_weights(tiny_model("llama", seed=5, tie_word_embeddings=True))
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    assert hash_weights(get_peft_model(plain, lora)) == wanted != other


def test_predictions_are_what_the_metrics_count(plain: tuple[Path, dict[str, Any]]) -> None:
    folder, found = plain
    rows = read_predictions(folder / "predictions.jsonl")
    assert [row["row"] for row in rows] == list(range(6)) and {row["task"] for row in rows} <= {"chain", "letters"}
    assert sum(row["hit"] for row in rows) / 6 == found["metrics"]["accuracy"]
    loss = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    assert loss == pytest.approx(found["metrics"]["loss"])


def test_evaluate_writes_the_same_predictions(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    target = tmp_path / "found.jsonl"
    sizes = ["--data.max_eval_samples", "6", "--evaluation.max_new_tokens", "4"]
    assert main(["evaluate", str(plain[0]), "--recipe", str(RECIPE), "--predictions", str(target), *sizes]) == 0
    ours, theirs = read_predictions(target), read_predictions(plain[0] / "predictions.jsonl")
    assert [row["prediction"] for row in ours] == [row["prediction"] for row in theirs]
    assert [row["nll"] for row in ours] == pytest.approx([row["nll"] for row in theirs], rel=1e-4)


def test_a_run_that_cannot_go_on_begins_anew(plain: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Its checkpoints are there without the record of their rows: none of them may be taken for the new run's."""
    saves = {"training__save_strategy": "steps", "training__save_steps": 2}
    record(tmp_path, **ALONE, **saves)
    (tmp_path / "arm.json").unlink()
    (tmp_path / "progress-0.json").write_text('{"rows": []}')
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-6")
    again = record(tmp_path, **ALONE, **saves)
    assert {name: again[name] for name in SAME} == {name: plain[1][name] for name in SAME}
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_goes_on_has_the_record_of_one_that_was_never_stopped(
    plain: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    saves = {"training__save_strategy": "steps", "training__save_steps": 2}
    whole = record(tmp_path, **ALONE, **saves)
    assert whole["order"] == plain[1]["order"]
    shutil.rmtree(tmp_path / "checkpoint-4")  # as if it had been killed in its third step
    (tmp_path / "arm.json").unlink()
    again = record(tmp_path, **ALONE, **saves)
    assert {name: again[name] for name in SAME} == {name: whole[name] for name in SAME}
    assert all(again["clocks"][name][:2] == whole["clocks"][name][:2] for name in ("wall", "processor"))
    assert again["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-5)
