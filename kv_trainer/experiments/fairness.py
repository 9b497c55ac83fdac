"""Whether the arms of an experiment were given the same: what their runs recorded, compared seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .experiment import BUDGET, SAME, Experiment

Records = Mapping[tuple[str, int], Mapping[str, Any]]
TIME_APART = 0.1  # of the seconds given to an arm, that it may have taken more or less


@dataclass
class Finding:
    """A difference between two arms' runs, or text that is both trained and tested on.

    allowed: why the experiment file says it may be so; None for a violation. Nothing allows other evaluation rows, or
    such that are trained on.
    """

    arm: str
    words: str
    allowed: str | None = None


def check_budget(experiment: Experiment, arms: Sequence[str], seeds: Iterable[int], records: Records) -> list[Finding]:
    """All that differs from the arm that one is compared with, one finding an arm and kind."""
    seeds, found = list(seeds), []
    for name in arms:
        arm, against = experiment.arms[name], experiment.compared_with(name)
        timed = arm.seconds_of is not None or experiment.arms[against].seconds_of is not None
        for key, words in (SAME if timed else BUDGET | SAME).items():
            wrong = [s for s in seeds if records[name, s].get(key) != records[against, s].get(key)]
            if wrong:
                ours, theirs = records[name, wrong[0]].get(key), records[against, wrong[0]].get(key)
                allowed = arm.unequal.why if arm.unequal and key in arm.unequal.what else None
                found.append(Finding(name, told(words, against, wrong, ours, theirs), allowed))
        found += between_seeds(name, seeds, records)
        if arm.seconds_of is not None:
            found += time_apart(name, arm.seconds_of, seeds, records)
        leaks = {s: int(records[name, s].get("shared_prompts") or 0) for s in seeds}
        worst = max(leaks.values(), default=0)
        if worst:
            found.append(Finding(name, f"{worst} evaluation rows have a prompt that is trained on"))
    return found + teachers_apart(arms, seeds, records)


def between_seeds(name: str, seeds: list[int], records: Records) -> list[Finding]:
    """The rows of an arm are those of all its seeds: files may have been made anew since the first was run."""
    found = []
    for key in ("train_rows", "eval_rows"):
        first = records[name, seeds[0]].get(key)
        wrong = [seed for seed in seeds if records[name, seed].get(key) != first]
        if wrong:
            told_seeds = ", ".join(map(str, wrong))
            found.append(Finding(name, f"{SAME[key]} of seed {told_seeds} differ from those of seed {seeds[0]}"))
    return found


def time_apart(name: str, other: str, seeds: list[int], records: Records) -> list[Finding]:
    """Where an arm with another's seconds did not take them: a machine is not always as fast."""
    shares = {seed: records[name, seed]["seconds"] / records[other, seed]["seconds"] for seed in seeds}
    wrong = [f"{share:.0%} (seed {seed})" for seed, share in shares.items() if abs(share - 1) > TIME_APART]
    return [Finding(name, f"took {', '.join(wrong)} of the seconds of {other}")] if wrong else []


def teachers_apart(arms: Sequence[str], seeds: list[int], records: Records) -> list[Finding]:
    """One model has the same weights in all runs; random ones, drawn anew for each seed, have no hash."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    found = {}
    for name in arms:
        for seed in seeds:
            for teacher, (model, weights) in (records[name, seed].get("teachers") or {}).items():
                where, known = first.setdefault((teacher, model), (f"{name}-{seed}", weights))
                if known != weights:
                    found[name, teacher] = f"the weights of {teacher} are not those of {where}, seed {seed}"
    return [Finding(name, words) for (name, _), words in found.items()]


def told(words: str, against: str, seeds: list[int], ours: Any, theirs: Any) -> str:
    numbers = isinstance(ours, int) and isinstance(theirs, int)
    which = f" ({ours:,} and {theirs:,})" if numbers else ""
    return f"{words} differ from those of {against}{which}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def violations(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.allowed is None]


def agreement(
    experiment: Experiment, arms: Iterable[str], findings: Iterable[Finding], runs: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """What was checked, and how it came out: a line each. runs: the records, of which older ones lack some things."""
    arms, found = list(arms), list(findings)
    known = sum("teachers" in record for record in runs)
    teachers_told = "the same in all runs" if known == len(runs) else f"the same in the {known} runs that recorded them"
    teachers_told = teachers_told if known else "not recorded by the version that made the runs"
    timed = [name for name in arms if experiment.arms[name].seconds_of]
    lines = []
    for key, words in (BUDGET | SAME).items():
        wrong = [f.arm for f in found if f.words.startswith(words)]
        apart = f", but for {', '.join(timed)} (another arm's seconds)" if key in BUDGET and timed else ""
        lines.append((words, f"differ in {', '.join(wrong)}" if wrong else f"the same in all arms{apart}"))
    leaks = [f.arm for f in found if "trained on" in f.words]
    said = [f.arm for f in found if "the weights of" in f.words]
    lines.append(("weights of each teacher", f"differ in {', '.join(said)}" if said else teachers_told))
    if timed:
        late = [f.arm for f in found if "of the seconds of" in f.words]
        lines.append(("seconds of an arm given another's", "more than 10% apart" if late else "within 10%"))
    lines.append(("prompts in both splits", f"some, in {', '.join(leaks)}" if leaks else "none, by hash"))
    return lines
