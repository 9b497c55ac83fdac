"""All benchmarks, one after another: python benchmarks/all.py [--only floor peers] [--quick] [--device cpu]

Each runs in a process of its own, as its own command does. Writes docs/results/benchmarks.json, .md and .png; rows of
benchmarks that are not run now stay. Needs the [bench] extra, an idle machine and, whole, about half an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
# script -> what its rows promise at most; None: told, not promised
PROMISES: dict[str, dict[str, float | None]] = {
    "floor": {"step_over_floor": 1.05, "step_over_floor_all_losses": 1.10, "step_over_floor_confidence": None},
    "step_time": {
        "quickstart_step_over_floor": 1.15, "quickstart_first_epoch": None, "quickstart_later": None,
    },
    "stored": {"stored_step_over_sft": 1.10, "stored_step_over_live": None},
    "peers": {"step_over_gkd": 1.0, "memory_over_gkd": 1.0, "step_over_gold_uld": 0.5, "step_over_trl_sft": None},
    "memory": {
        "memory_over_sft_plus_teachers": 1.10, "five_teachers_memory_over_one": 1.15,
        "five_teachers_memory_over_one_kv_student_to_teacher": 1.15,
        "five_teachers_memory_over_one_kv_teacher_to_student": None,
    },
    "attention_weighting": {
        "importance_step_share": 0.03, "importance_memory_over_eager": 0.05, "importance_memory_exponent": 1.1,
    },
    "growth": {"time_exponent_in_length": 1.1, "time_exponent_in_teachers": 1.0},
}  # fmt: skip
START, END = "<!-- table -->\n", "<!-- end -->"
LIMITS = {name: limit for rows in PROMISES.values() for name, limit in rows.items()}


def measure(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark saves."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        more = ["--quick"] * options.quick + ["--device", options.device]
        command = [sys.executable, str(HERE / f"{script}.py"), "--json", str(file), *more]
        subprocess.run(command, check=True)
        return json.loads(file.read_text())


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | median | low to high | promised | of |", "|---|---|---|---|---|"]
    for row in rows:
        limit = LIMITS.get(row["name"])
        spread = f"{row['low']:.3f} to {row['high']:.3f}, {row['repeats']} repeats"
        promised = "" if limit is None else f"at most {limit:g}"
        lines.append(f"| `{row['name']}` | {row['ratio']:.3f} | {spread} | {promised} | {row['about']} |")
    return "\n".join(lines)


def draw(seconds: dict[str, dict[str, list[float]]], path: Path) -> None:
    """How the time of what distilling adds grows: each repeat a dot, the medians a line."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    for axes, (name, by_size) in zip(figure.subplots(1, 2), seconds.items(), strict=True):
        sizes = [int(size) for size in by_size]
        medians = [1000 * sorted(each)[len(each) // 2] for each in by_size.values()]
        for size, each in zip(sizes, by_size.values(), strict=True):
            axes.plot([size] * len(each), [1000 * x for x in each], ".", color="#56B4E9", markersize=5)
        axes.plot(sizes, medians, color="#0072B2")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("positions" if name == "length" else name)
        axes.set_ylabel("ms a step")
        axes.grid(color="#DDDDDD", linewidth=0.6)
    figure.suptitle("Time that distilling adds to the models' own work", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROMISES, default=list(PROMISES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.output == RESULTS and (options.quick or options.device != "cpu"):
        parser.error("docs/results has rows of a CPU, at full size; give another --output.")
    file = options.output / "benchmarks.json"
    saved = json.loads(file.read_text()) if file.exists() else {"rows": []}
    rows = {row["name"]: row for row in saved["rows"]}
    for script in options.only:
        found = measure(script, options)
        rows |= {row["name"]: row for row in found["rows"]}
        about = {key: found[key] for key in ("machine", "versions")}
        if any(saved.get(key, value) != value for key, value in about.items()):
            raise SystemExit(f"{file} has rows of another machine or other versions; delete it and run them all.")
        ordered = [rows[name] for name in LIMITS if name in rows]
        file.write_text(json.dumps({**about, "rows": ordered}, indent=1) + "\n")
        if script == "growth":
            draw(found["seconds"], options.output / "benchmarks.png")
    page = options.output / "benchmarks.md"
    text = page.read_text() if page.exists() else f"{START}{END}"
    before, _, rest = text.partition(START)
    page.write_text(f"{before}{START}\n{table(ordered)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
