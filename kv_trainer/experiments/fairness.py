"""Whether the arms of an experiment were given the same: what their runs recorded, compared seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .experiment import Experiment

Records = Mapping[tuple[str, int], Mapping[str, Any]]
# What must agree -> what it is called. BUDGET: not where an arm is given another arm's seconds.
BUDGET = {"steps": "optimizer steps", "samples": "samples", "tokens": "supervised tokens", "order": "order of rows"}
SAME = {
    "initial": "first weights of the student", "train_rows": "training rows and labels", "eval_rows": "evaluation rows",
    "cross_entropy": "cross-entropy term",
}  # fmt: skip


@dataclass
class Finding:
    """A difference between two arms' runs, or text that is both trained and tested on.

    allowed: why the experiment file says it may be so; None for a violation. Nothing allows other evaluation rows, or
    such that are trained on.
    """

    arm: str
    words: str
    allowed: str | None = None


def check_budget(experiment: Experiment, arms: Iterable[str], seeds: Iterable[int], records: Records) -> list[Finding]:
    """All that differs from the arm that one is compared with, one finding an arm and kind."""
    seeds, found = list(seeds), []
    for name in arms:
        arm, against = experiment.arms[name], experiment.compared_with(name)
        timed = arm.seconds_of is not None or experiment.arms[against].seconds_of is not None
        for key, words in (SAME if timed else BUDGET | SAME).items():
            wrong = [s for s in seeds if records[name, s].get(key) != records[against, s].get(key)]
            if wrong:
                ours, theirs = records[name, wrong[0]].get(key), records[against, wrong[0]].get(key)
                allowed = None if key == "eval_rows" else arm.unequal
                found.append(Finding(name, told(words, against, wrong, ours, theirs), allowed))
        leaks = {s: int(records[name, s].get("shared_prompts") or 0) for s in seeds}
        worst = max(leaks.values(), default=0)
        if worst:
            found.append(Finding(name, f"{worst} evaluation rows have a prompt that is trained on"))
    return found


def told(words: str, against: str, seeds: list[int], ours: Any, theirs: Any) -> str:
    numbers = isinstance(ours, int) and isinstance(theirs, int)
    which = f" ({ours:,} and {theirs:,})" if numbers else ""
    return f"{words} differ from those of {against}{which}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def violations(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.allowed is None]


def agreement(experiment: Experiment, arms: Iterable[str], findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """What was checked, and how it came out: a line each."""
    arms, found = list(arms), list(findings)
    timed = [name for name in arms if experiment.arms[name].seconds_of]
    lines = []
    for key, words in (BUDGET | SAME).items():
        wrong = [f.arm for f in found if f.words.startswith(words)]
        apart = f", but for {', '.join(timed)} (another arm's seconds)" if key in BUDGET and timed else ""
        lines.append((words, f"differ in {', '.join(wrong)}" if wrong else f"the same in all arms{apart}"))
    leaks = [f.arm for f in found if "trained on" in f.words]
    lines.append(("prompts in both splits", f"some, in {', '.join(leaks)}" if leaks else "none, by hash"))
    return lines
