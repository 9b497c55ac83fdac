"""Whether the arms of an experiment were given the same: what their runs recorded, compared seed by seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes import settings_of
from .experiment import BUDGET, SAME, Experiment
from .jobs import Job, given_seconds

WHOSE = ("model", "revision", "dtype", "quantization")  # settings of a teacher by which its weights are what they are

Records = Mapping[tuple[str, int], Mapping[str, Any]]
UNRECORDED = "not recorded by the version that made the runs"
TIME_APART = 0.1  # of the seconds given to an arm, that it may have taken more or less


@dataclass
class Finding:
    """A difference between two arms' runs, or text that is both trained and tested on.

    allowed: why the experiment file says it may be so; None for a violation. Nothing allows other evaluation rows, or
    such that are trained on. against: the other arm; None where the arm differs from all, or from what it should be.
    """

    arm: str
    words: str
    allowed: str | None = None
    against: str | None = None

    def concerns(self, arm: str, against: str) -> bool:
        """Whether it bears on a comparison of two arms."""
        return self.arm in (arm, against) if self.against is None else (self.arm, self.against) == (arm, against)


def check_budget(experiment: Experiment, arms: Sequence[str], seeds: Iterable[int], records: Records) -> list[Finding]:
    """All that differs between arms that are compared, one finding a pair and kind; and what no arm may have."""
    seeds, found = list(seeds), []
    pairs = experiment.pairs(arms)
    for name in arms:
        for other in [against for arm, against in pairs if arm == name]:
            found += given_apart(experiment, name, other, seeds, records)
        found += between_seeds(name, seeds, records)
        if experiment.arms[name].seconds_of is not None:
            found += time_apart(experiment, name, seeds, records)
        leaks = {s: int(records[name, s].get("shared_prompts") or 0) for s in seeds}
        worst = max(leaks.values(), default=0)
        if worst:
            found.append(Finding(name, f"{worst} evaluation rows have a prompt that is trained on"))
    return found + teachers_apart(experiment, arms, seeds, records)


def given_apart(experiment: Experiment, name: str, other: str, seeds: list[int], records: Records) -> list[Finding]:
    """What two arms were not given alike, as far as both have recorded it."""
    arm, found = experiment.arms[name], []
    more_steps = arm.seconds_of is not None and other == arm.like  # than the same arm: what it is there for
    for key, words in (SAME if more_steps else BUDGET | SAME).items():
        mine, theirs = (length_of(experiment, n) if key in BUDGET else n for n in (name, other))
        wrong = [s for s in seeds if apart(records, key, mine, theirs, s)]
        if wrong:
            each = records[mine, wrong[0]].get(key), records[theirs, wrong[0]].get(key)
            allowed = excuse(experiment, key, name, other, wrong, records)
            whose = "" if mine == name else f" of {mine}, whose seconds it was given,"
            given = other if theirs == other else f"{theirs}, whose seconds {other} was given,"
            found.append(Finding(name, told(words + whose, given, wrong, *each), allowed, other))
    return found


def apart(records: Records, key: str, one: str, other: str, seed: int) -> bool:
    ours, theirs = records[one, seed].get(key), records[other, seed].get(key)
    return ours is not None and theirs is not None and ours != theirs


def excuse(experiment: Experiment, key: str, name: str, other: str, wrong: list[int], records: Records) -> str | None:
    """Why an arm may differ from another: it may have this otherwise; or the other may, and the arm has it as all do.

    As all do: as the arm has it with which the other is compared itself.
    """
    arm, against = experiment.arms[name].unequal, experiment.arms[other].unequal
    if arm is not None and key in arm.what:
        return arm.why
    if against is None or key not in against.what:
        return None
    reference = experiment.compared_with(other)
    mine, usual = (length_of(experiment, n) if key in BUDGET else n for n in (name, reference))
    alike = not any(apart(records, key, mine, usual, seed) for seed in wrong)
    return against.why if alike or reference == other else None


def length_of(experiment: Experiment, name: str) -> str:
    """The arm whose steps, rows and tokens say how long this one is: itself, or the one whose seconds it was given."""
    while other := experiment.arms[name].seconds_of:
        name = other
    return name


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


def time_apart(experiment: Experiment, name: str, seeds: list[int], records: Records) -> list[Finding]:
    """Where an arm with another's seconds did not take them: a machine is not always as fast, nor is every machine."""
    other = str(experiment.arms[name].seconds_of)
    shares = {seed: share_taken(experiment, name, seed, records) for seed in seeds}
    wrong = [f"{share:.0%} (seed {seed})" for seed, share in shares.items() if abs(share - 1) > TIME_APART]
    found = [Finding(name, f"took {', '.join(wrong)} of the seconds of {other}")] if wrong else []
    elsewhere = [str(s) for s in seeds if is_elsewhere(records[name, s], records[other, s])]
    if elsewhere:
        words = f"its seconds are of another machine than those of {other}, seed{'s' * (len(elsewhere) > 1)}"
        found.append(Finding(name, f"{words} {', '.join(elsewhere)}"))
    return found


def share_taken(experiment: Experiment, name: str, seed: int, records: Records) -> float:
    """Of the seconds that an arm was given, how many it took."""
    return records[name, seed]["seconds"] / given_seconds(experiment, name, seed, records)


def machine(record: Mapping[str, Any]) -> str:
    return f"{record.get('machine')}, {record.get('threads')} threads"


def is_elsewhere(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs are known to be of two machines. Older records do not name the processor."""
    processors = {record["cpu"] for record in (one, other) if record.get("cpu")}
    return machine(one) != machine(other) or len(processors) > 1


def teachers_apart(experiment: Experiment, arms: Sequence[str], seeds: list[int], records: Records) -> list[Finding]:
    """One model has the same weights in all runs; random ones, drawn anew for each seed, have no hash.

    One model: as the arm's recipe names it. Folders of one name may hold two, and so may two revisions.
    """
    first: dict[tuple[str, str], tuple[str, str]] = {}
    found = {}
    for name in arms:
        sections = settings_of(Job(experiment, name, seeds[0]).recipe_text())["teachers"]
        for seed in seeds:
            for teacher, (model, weights) in (records[name, seed].get("teachers") or {}).items():
                which = {key: (sections.get(teacher) or {}).get(key) for key in WHOSE}
                same = (teacher, json.dumps([model, which]))
                where, known = first.setdefault(same, (f"{name}-{seed}", weights))
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
    experiment: Experiment, arms: Iterable[str], seeds: Iterable[int], findings: Iterable[Finding], records: Records
) -> list[tuple[str, str]]:
    """What was checked, and how it came out: a line each. Older records lack some things."""
    arms, seeds, findings = list(arms), list(seeds), list(findings)
    timed = [name for name in arms if experiment.arms[name].seconds_of]
    lines = []
    for key, words in (BUDGET | SAME).items():
        wrong = dict.fromkeys(f.arm for f in findings if f.words.startswith(words))
        timing = f", but for {', '.join(timed)} (another arm's seconds)" if key in BUDGET and timed else ""
        judged = [name for name in arms if name not in timed or key not in BUDGET]
        each = [[value for name in judged if (value := records[name, seed].get(key)) is not None] for seed in seeds]
        where = "all arms" if all(len(set(map(str, values))) <= 1 for values in each) else "arms that are compared"
        lines.append((words, f"differ in {', '.join(wrong)}" if wrong else same(where + timing, each, len(judged))))
    leaks = dict.fromkeys(f.arm for f in findings if "trained on" in f.words)
    said = dict.fromkeys(f.arm for f in findings if "the weights of" in f.words)
    told_weights = [[name for name in arms if "teachers" in records[name, seed]] for seed in seeds]
    teachers = same("all runs", told_weights, len(arms))
    lines.append(("weights of each teacher", f"differ in {', '.join(said)}" if said else teachers))
    lines.append(("settings of training", "; ".join(trained_apart(experiment, arms)) or "the same in all arms"))
    if timed:
        late = any("of the seconds of" in f.words for f in findings)
        lines.append(("seconds of an arm given another's", "more than 10% apart" if late else "within 10%"))
    lines.append(("prompts in both splits", f"some, in {', '.join(leaks)}" if leaks else "none, by hash"))
    lines.append(("machine and threads", where_made([[machine(records[n, s]) for n in arms] for s in seeds])))
    cpus = [[record["cpu"] for n in arms if (record := records[n, s]).get("cpu")] for s in seeds]
    known = sum(map(len, cpus))
    found = where_made(cpus) if known else UNRECORDED
    if 0 < known < (runs := len(arms) * len(seeds)):
        found = f"{known} of {runs} runs recorded it; among those {found}"
    lines.append(("processor", found))
    code = where_made([[str(records[n, s].get("code")) for n in arms] for s in seeds])
    return [*lines, ("code of this package, by a hash", code)]


def same(where: str, each: list[list[Any]], arms: int) -> str:
    """each: of every seed, what the arms have recorded."""
    known = sum(map(len, each))
    if not known:
        return UNRECORDED
    return f"the same in {where if known == arms * len(each) else f'the {known} runs that recorded it'}"


def trained_apart(experiment: Experiment, arms: list[str]) -> list[str]:
    """The settings of training that arms which are compared do not share, a word a pair; these may be what is asked."""
    found = []
    for name, other in experiment.pairs(arms):
        ours, theirs = (experiment.training(one) for one in (name, other))
        keys = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if keys:
            found.append(f"{name} and {other} differ in {', '.join(keys)}")
    return found


def where_made(each: list[list[str]]) -> str:
    """each: of every seed, of every arm. Nobody is to blame, so these are no findings."""
    if len({value for values in each for value in values}) <= 1:
        return "the same in all runs"
    within = all(len(set(values)) <= 1 for values in each)
    return "the same in all arms of a seed, but not in all seeds" if within else "differ between runs, see the end"
