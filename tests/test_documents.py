"""What the documents say is what the committed results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
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


def test_every_row_is_there_and_names_a_command_that_is(benchmarks: dict) -> None:
    rows = {row["name"]: row for row in benchmarks["rows"]}
    assert set(ROWS) <= set(rows) and {"torch", "transformers"} <= set(benchmarks["versions"]) and benchmarks["machine"]
    for row in rows.values():
        assert row["low"] <= row["ratio"] <= row["high"] and row["repeats"] >= 1
        assert (ROOT / row["command"].split()[1]).is_file()
