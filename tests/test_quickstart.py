"""What the quickstart ships: data without leaks, and two specialists that know one task each."""

from __future__ import annotations

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kv_trainer.arguments import EvaluationConfig
from kv_trainer.data import EVALUATED, Reader, encode_rows, load_split
from kv_trainer.evaluation import evaluate_model
from kv_trainer.recipes import load_recipe

FOLDER = Path(__file__).parent.parent / "recipes" / "quickstart"
sys.path.insert(0, str(FOLDER))
from make_data import ROWS, SEED, prompt_hash  # noqa: E402
from tasks import TASKS, unique_rows  # noqa: E402

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def splits() -> dict[str, Rows]:
    return {name: [json.loads(line) for line in (FOLDER / "data" / f"{name}.jsonl").open()] for name in ROWS}


def test_no_prompt_is_in_two_splits(splits: dict[str, Rows]) -> None:
    hashes = [{prompt_hash(row) for row in rows} for rows in splits.values()]
    assert sum(map(len, hashes)) == sum(map(len, splits.values())), "and none is twice in one"
    assert len(set.union(*hashes)) == sum(map(len, hashes))


@pytest.mark.parametrize("task", TASKS)
def test_the_data_is_what_the_seed_gives(splits: dict[str, Rows], task: str) -> None:
    stream = unique_rows(task, SEED)
    for name, count in ROWS.items():
        shipped = {row["prompt"]: row for row in splits[name] if row["task"] == task}
        made = list(islice(stream, count))
        short = [row.pop("short") for row in made]  # written on request
        assert shipped == {row["prompt"]: row for row in made}
        for row, text in zip(made, short, strict=True):
            assert text.split()[-2:] == ["####", row["answer"]] and len(text) < len(row["completion"])
            assert set(text.replace("#", "").split()) <= set(re.split("[ =]", row["completion"]))


def test_every_step_of_a_chain_is_right() -> None:
    rng = random.Random(5)
    for row in (TASKS["chain"](rng) for _ in range(200)):
        worked, answer = row["completion"].split(" #### ")
        steps = [step.split("=") for step in worked.split()]
        assert all(eval(left) == int(right) for left, right in steps)  # noqa: S307
        assert steps[-1][1] == answer == row["answer"] == str(eval(row["prompt"].rstrip("=")))  # noqa: S307


def test_every_step_of_the_letters_is_right() -> None:
    rng = random.Random(5)
    for row in (TASKS["letters"](rng) for _ in range(200)):
        word, *names, _ = row["prompt"].split()
        told = row["completion"].split(" #### ")[0].split()
        assert told[::2] == names
        for name, found in zip(names, told[1::2], strict=True):
            if name.startswith("swap"):
                i, j = int(name[4]) - 1, int(name[5]) - 1
                word = word[:i] + word[j] + word[i + 1 : j] + word[i] + word[j + 1 :]
            else:
                word = word[::-1] if name == "rev" else word[int(name[3]) :] + word[: int(name[3])]
            assert found == word
        assert row["answer"] == word


@pytest.mark.parametrize("name", TASKS)
def test_a_specialist_knows_its_own_task_alone(name: str) -> None:
    folder = FOLDER / "teachers" / name
    assert (folder / "model.safetensors").stat().st_size <= 2_000_000
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_recipe(FOLDER / "two_teachers.yaml").args.data
    rows = encode_rows(load_split(data, "test", 120), Reader(tokenizer), {}, data, keep=EVALUATED)
    found = evaluate_model(model, tokenizer, rows, EvaluationConfig(max_new_tokens=90, batch_size=60), progress=False)
    own, other = found[f"eval_accuracy_{name}"], found[f"eval_accuracy_{next(t for t in TASKS if t != name)}"]
    assert own >= 0.97 and other <= 0.02
