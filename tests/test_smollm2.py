"""recipes/smollm2: rows whose worked solutions are right, without repeats; recipes and experiments that resolve."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoConfig, AutoTokenizer

from kv_trainer.metrics import extract_answer, reference_answer

pytest.importorskip("reasoning_gym", reason="the rows of recipes/smollm2 need pip install 'kv_trainer[smollm2]'")
FOLDER = Path(__file__).parent.parent / "recipes" / "smollm2"
STEP = re.compile(r"([\d*+ -]+) = (-?\d+)$")


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_problems", FOLDER / "problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student():
    return AutoTokenizer.from_pretrained(FOLDER / "student")


@pytest.mark.parametrize("task", ["gsm_symbolic", "leg_counting", "chain_sum"])
def test_a_row_ends_in_its_answer_and_every_step_is_right(tasks, student, task) -> None:
    dropped: Counter[str] = Counter()
    rows = list(tasks.usable_rows(task, student, seed=3, drawn=60, dropped=dropped))
    assert len(rows) + sum(dropped.values()) == 60 and len(rows) >= 30
    for row in rows:
        assert extract_answer(row["completion"], "gsm8k") == reference_answer(row["answer"], "gsm8k") and row[
            "prompt"
        ].endswith("\n")
        steps = row["completion"].splitlines()[:-1]
        if task != "gsm_symbolic":  # the generator's own text
            found = [STEP.search(step) for step in steps]
            assert all(found) and [eval(step[1]) for step in found] == [int(step[2]) for step in found], row
            assert found[-1][2] == row["answer"]


def test_a_problem_told_again_is_a_repeat(tasks) -> None:
    def same(task, template=None, question="", **metadata):
        return tasks.same_problem(task, {"question": question, "metadata": metadata}, template)

    crabs, ants = {"crab": 2, "ant": 3}, {"ant": 3, "crab": 2}
    assert same("leg_counting", animals=crabs) == same("leg_counting", animals=ants)
    assert same("leg_counting", animals=crabs) != same("leg_counting", animals={"crab": 3, "ant": 2})
    assert same("chain_sum", expression="4 - 1 + 7") == same("chain_sum", expression="7 - 1 + 4")
    assert same("chain_sum", expression="4 - 1 + 7") != same("chain_sum", expression="1 - 4 + 7")
    assert same("gsm_symbolic", 4, "Ann has 3.") == same("gsm_symbolic", 4, "Bob has 3.")
    assert same("gsm_symbolic", 4, "Ann has 3.") != same("gsm_symbolic", 5, "Ann has 3.")


def test_both_students_share_the_tokenizer_in_git(student) -> None:
    for name in ("student", "student_large"):
        assert AutoConfig.from_pretrained(FOLDER / name).vocab_size == len(student) == 2048
    assert json.loads((FOLDER / "student" / "tokenizer.json").read_text())["model"]["type"] == "BPE"
