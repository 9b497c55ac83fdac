"""Publish a finished experiment, and keep every figure in the documents what its results say.

python docs/results/publish.py EXPERIMENT.yaml NAME [--seeds 1 2 3]   # report and runs into docs/results/NAME/, then:
python docs/results/publish.py                                        # all documents

A document takes a figure from docs/results/NAME/results.json between two comments, which a reader does not see:
`<!-- NAME ARM METRIC -->91.2% ± 3.7<!-- / -->`. METRIC is one of the arms' metrics, or steps, tokens or seconds of the
budget; `ARM METRIC mean` and `ARM METRIC SEED` are the mean alone and one seed's value; `ARM-OTHER METRIC` is the
difference of two means; `ARM METRIC p` is the p of its comparison, `ARM-OTHER METRIC p` of that with OTHER, and
`interval`, in the place of p, the 95% interval of the difference.
`ARM-OTHER reached_steps` and `reached_seconds`: after which share of all that OTHER took, the arm that all are compared
with, ARM was where OTHER ended.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from kv_trainer.experiments.archive import pack
from kv_trainer.experiments.experiment import load_experiment
from kv_trainer.experiments.jobs import Job
from kv_trainer.experiments.statistics import mean
from kv_trainer.experiments.words import figure_of, over_seeds, p_words, percent, unit
from kv_trainer.files import write_text

RESULTS = Path(__file__).parent
ROOT = RESULTS.parents[1]
PARTS = ("report.md", "results.json", "commands.sh")
ARCHIVE = "runs.zip"
FIGURE = re.compile(
    r"<!-- (?P<name>[\w-]+) (?P<arm>\w+)(?:-(?P<other>\w+))? (?P<metric>\w+)(?: (?P<form>\w+))? -->.*?<!-- / -->"
)


@cache
def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))


def figure(name: str, arm: str, metric: str, other: str | None = None, form: str | None = None) -> str:
    """A figure of a published experiment, as documents show it. LookupError where there is none."""
    found, of_budget = results(name), metric in ("steps", "tokens", "seconds")
    if metric.startswith("reached_") and other and not form:
        if other != found["against"]:
            raise LookupError(f"<!-- {name} {arm}-{other} {metric} -->: it was measured for {found['against']} alone")
        unit_of = metric.removeprefix("reached_")
        return f"{mean(found['reached'][arm][unit_of]) / found['budget'][other][unit_of]:.0%}"
    if (other and form not in (None, "p", "interval")) or (of_budget and (other or form)):
        raise LookupError(f"<!-- {name} {arm} {other} {metric} {form} --> says two things at once")
    if of_budget:
        return f"{found['budget'][arm][metric]:,.0f}"
    values = found["arms"][arm][metric]
    if form in ("p", "interval"):  # with the arm that it is first compared with, unless another is named
        pairs = [c for c in found["comparisons"] if c["arm"] == arm and c["metric"] == metric]
        one = [c for c in pairs if other in (None, c["against"])][0]
        if form == "p":
            return p_words(one["p"])
        if one["low"] is None:
            raise LookupError(f"<!-- {name} {arm} {other} {metric} interval -->: none could be drawn of so few rows")
        return f"{percent(metric, one['low'])} to {percent(metric, one['high'])}"
    if other is not None:
        return f"{percent(metric, mean(values) - mean(found['arms'][other][metric]))} {unit(metric)}"
    if form == "mean":
        return figure_of(metric, mean(values))
    if form is not None:
        return figure_of(metric, dict(zip(map(str, found["seeds"]), values, strict=True))[form])
    return over_seeds(metric, values)


def fill(text: str) -> str:
    """A document with every figure as the results have it."""

    def again(match: re.Match[str]) -> str:
        start = match.group(0).partition("-->")[0]
        return f"{start}-->{figure(**match.groupdict())}<!-- / -->"

    return FIGURE.sub(again, text)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted(RESULTS.rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]


def publish(experiment: str, name: str, seeds: list[str]) -> None:
    """The report, remade from the finished runs, and these; ValueError where some are not."""
    chosen = ["--seeds", *seeds] if seeds else []
    subprocess.run([sys.executable, "-m", "kv_trainer", "compare", experiment, "--report-only", *chosen], check=True)
    loaded = load_experiment(experiment)
    report, target = Path(loaded.output_dir) / "report", RESULTS / name
    found = json.loads((report / "results.json").read_text(encoding="utf-8"))
    if found["missing"]:
        raise ValueError(f"{experiment} is not finished: {', '.join(found['missing'])}; run it, or give --seeds.")
    target.mkdir(exist_ok=True)
    for part in PARTS:
        shutil.copyfile(report / part, target / part)
    shutil.rmtree(target / "figures", ignore_errors=True)
    shutil.copytree(report / "figures", target / "figures")
    pack([Job(loaded, arm, seed) for arm in found["arms"] for seed in found["seeds"]], target / ARCHIVE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT.yaml")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("--seeds", nargs="+", default=[], metavar="SEED")
    options = parser.parse_args()
    if options.experiment and not options.name:
        parser.error("give the NAME of its folder in docs/results too.")
    try:
        if options.experiment:
            publish(options.experiment, options.name, options.seeds)
        fill_documents()
    except (ValueError, LookupError, subprocess.CalledProcessError) as error:
        sys.exit(f"publish.py: {error}")


def fill_documents() -> None:
    for page in documents():
        text = page.read_text(encoding="utf-8")
        if fill(text) != text:
            write_text(page, fill(text))
            print(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
