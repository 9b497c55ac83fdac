"""The report of an experiment: report.md, report.html, results.json, commands.sh, and figures/."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_text
from ..metrics import MACRO
from .blocks import Block, Code, Grid, Heading, Items, Picture, Text, as_html, as_markdown
from .contribution import find_games, measures
from .fairness import agreement, violations
from .figures import draw_all
from .jobs import Job
from .reach import reached
from .results import Study
from .statistics import FEWEST, RESAMPLES, is_share, mean
from .words import finding_of, over_seeds, p_words, passes_left_out, percent, spread_of, steps_of_timed, unit

QUICK = (
    "A quick run: every run was cut short (kv-trainer train --quick, with what the experiment's `quick` changes). It "
    "shows that everything works, not which arm is better."
)
CLOCKS = {
    "wall": "Seconds of training are of the wall, without loading, evaluations and saves.",
    "processor": "Seconds of training are of processor time a thread: runs shared the machine with other work.",
}
METHOD = (
    "p: two-sided paired t-test over seeds, Holm-corrected over all comparisons of the metric in this report. "
    f"Interval: 95%, over seeds (Student's) and over test items ({RESAMPLES:,} bootstrap resamples), arms paired by "
    "both, half-widths added in squares; over seeds alone where runs left no predictions; each by itself, not "
    "corrected. Effect size: Cohen's d of the paired differences. Points: percentage points of a share; of another "
    "metric, percent of the value compared with."
)


def write_report(study: Study, folder: Path) -> None:
    """Everything in `folder`; pictures of an older report are replaced."""
    results = as_json(study)  # what cannot be reported is told before anything is replaced
    figures = draw_all(study, folder / "figures")
    write_text(folder / "results.json", results)
    write_text(folder / "commands.sh", "#!/bin/sh\nset -e\n" + "\n".join(commands(study)) + "\n")
    pictures = [Picture(folder / "figures" / name, f"figures/{name}", caption) for name, caption in figures.items()]
    blocks = contents(study, pictures)
    write_text(folder / "report.md", as_markdown(blocks))
    write_text(folder / "report.html", as_html(title(study), blocks))


def as_json(study: Study) -> str:
    """results.json. reached: arm -> steps and seconds until the final training loss of `against`, one a seed."""
    there = reached(study)
    content = {
        "experiment": study.experiment.path, "quick": study.experiment.is_quick, "seeds": study.seeds,
        "against": study.experiment.against, "arms": study.values,
        "budget": {a: {n: study.budget(a, n) for n in ("steps", "tokens", "seconds")} for a in study.arms},
        "comparisons": [asdict(comparison) for comparison in study.comparisons],
        "contributions": [
            {"kind": game.kind, "to": game.whole, "measure": name, "values": values}
            for game in find_games(study) for name, values in measures(game).items()
        ],
        "reached": there.each if there else {}, "rule": str(study.experiment.verdict),
        "fairness": [asdict(finding) for finding in study.findings], "missing": study.missing,
        "left_out": study.left_out,
        "machine": study.machines(),
    }  # fmt: skip
    return json.dumps(finite(content), indent=1) + "\n"


def finite(value: Any) -> Any:
    """Strict readers of JSON know no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def title(study: Study) -> str:
    path = Path(study.experiment.path)
    return f"{path.resolve().parent.name}/{path.stem}" + (" (quick)" if study.experiment.is_quick else "")


def contents(study: Study, pictures: list[Picture]) -> list[Block]:
    experiment = study.experiment
    loud: list[Block] = [Text(f"NOT FAIR: {f.arm}: {f.words}.", loud=True) for f in violations(study.findings)]
    if experiment.is_quick:
        loud.append(Text(QUICK, loud=True))
    if len(study.seeds) < FEWEST:
        seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
        loud.append(Text(f"{seeds}: no verdict is given for fewer than {FEWEST}.", loud=True))
    if study.missing:
        loud.append(Text(f"Not finished, and not in this report: {', '.join(study.missing)}.", loud=True))
    if study.left_out:
        loud.append(Text(f"Of the experiment, {' and '.join(study.left_out)} are not in this report.", loud=True))
    chosen = [arm for arm in study.arms if any(study.records[arm, seed].get("selected") for seed in study.seeds)]
    if chosen:
        words = "keeps the checkpoint, or stops, by the evaluation rows that are reported: too good to be true"
        loud.append(Text(f"{', '.join(chosen)}: each {words}.", loud=True))
    seeds = ", ".join(map(str, study.seeds))
    return [
        Heading(title(study), 1),
        Text(f"`{experiment.path}`: {len(study.arms)} arms of `{experiment.recipe}`, seeds {seeds}."),
        *loud,
        Heading("Findings"), Items([finding_of(study, one) for one in study.judged] or ["Nothing to compare."]),
        Heading("Arms"), Text(f"Mean ± standard deviation over seeds. {CLOCKS[experiment.clock]}"),
        Grid(arm_rows(study)),
        *map(Text, [*steps_of_timed(study), *passes_left_out(study)]),
        Heading("Comparisons"), Grid(comparison_rows(study)), Text(METHOD),
        *contributions(study),
        Heading("Fairness"), Grid(fairness_rows(study)), *unequal(study),
        Heading("Figures"), *pictures,
        Heading("Rule of the verdict"), Text(str(experiment.verdict)),
        Heading("Commands"), Text("Each run alone; `kv-trainer compare` with the experiment file makes all of them."),
        Code("\n".join(commands(study))),
        Heading("Versions and machine"), Items(study.machines()),
    ]  # fmt: skip


def contributions(study: Study) -> list[Block]:
    """What each player of each game brings; nothing where no arm lacks just one of them."""
    metric, rows = study.experiment.metrics[0], [["of", "to", "measure", "mean ± std over seeds"]]
    for game in find_games(study):
        for measure, values in measures(game).items():
            for player, each in values.items():
                words = f"{percent(metric, mean(each))}{spread_of(metric, each)} {unit(metric)}"
                rows.append([player, game.whole, measure, words])
    said = "Positive: it helps. Shapley values are means over all orders in which players may come in."
    return [Heading("Contributions"), Grid(rows), Text(said)] if len(rows) > 1 else []


def fairness_rows(study: Study) -> list[list[str]]:
    lines = agreement(study.experiment, study.arms, study.seeds, study.findings, study.records)
    return [["checked, seed by seed", "found"], *map(list, lines)]


def unequal(study: Study) -> list[Block]:
    allowed = [f"{f.arm}: {f.words}. The experiment says why: {f.allowed}" for f in study.findings if f.allowed]
    return [Items(allowed)] if allowed else []


def arm_rows(study: Study) -> list[list[str]]:
    known = dict.fromkeys([*study.experiment.metrics, *(f"accuracy_{t}" for t in study.tasks), MACRO, "perplexity"])
    shown = [name for name in known if all(name in study.values[arm] for arm in study.arms)]
    if len(study.tasks) < 2 and MACRO in shown:
        shown.remove(MACRO)
    rows = [["arm", *(name.replace("accuracy_", "") if name != MACRO else "macro" for name in shown)]]
    rows[0] += ["steps", "tokens", "seconds"]
    for arm in study.arms:
        name = f"{arm} (control)" if study.experiment.arms[arm].control else arm
        each = [study.values[arm][metric] for metric in shown]
        cells = [over_seeds(metric, values) for metric, values in zip(shown, each, strict=True)]
        budget = [f"{study.budget(arm, key):,.0f}" for key in ("steps", "tokens", "seconds")]
        rows.append([name, *cells, *budget])
    return rows


def comparison_rows(study: Study) -> list[list[str]]:
    rows = [["arm", "against", "metric", "difference", "95% interval", "p", "effect size", "verdict"]]
    for one in study.comparisons:
        interval = "-"
        if one.low is not None and one.high is not None:
            interval = f"{percent(one.metric, one.low)} to {percent(one.metric, one.high)}"
        difference = f"{percent(one.metric, one.difference)} {'points' if is_share(one.metric) else unit(one.metric)}"
        effect = "-" if one.effect is None else f"{one.effect:.1f}"
        rows.append([one.arm, one.against, one.metric, difference, interval, p_words(one.p), effect, one.verdict])
    return rows


def commands(study: Study) -> list[str]:
    return [
        Job(study.experiment, arm, seed).shown(study.records[arm, seed]) for arm in study.arms for seed in study.seeds
    ]
