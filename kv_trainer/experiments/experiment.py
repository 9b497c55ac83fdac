"""An experiment file: a recipe, arms that change it, seeds, and by what rule arms are judged."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from ..recipe_tree import Node, RecipeError, read_file
from ..recipe_values import build, mapping, suggest, unknown

# What an arm is given alike -> what it is called. BUDGET: not where an arm is given another arm's seconds.
BUDGET = {"steps": "optimizer steps", "samples": "samples", "tokens": "supervised tokens", "order": "order of rows"}
SAME = {
    "initial": "first weights of the student", "train_rows": "training rows and labels", "eval_rows": "evaluation rows",
    "cross_entropy": "cross-entropy term",
}  # fmt: skip
METRICS = ("accuracy", "accuracy_macro", "perplexity", "loss")  # of a run; accuracy of each task too
OURS = {"training.seed": "seeds", "training.output_dir": "output_dir"}
TAKE_ALL = ("accelerate", "torchrun", "deepspeed")  # launchers of one run on all devices
MAY_DIFFER = tuple(name for name in BUDGET | SAME if name != "eval_rows")


@dataclass
class VerdictRule:
    """In points: of a share, percentage points; of any other metric, percent of the value it is compared with."""

    keep: float = 2.0
    optional: float = 1.0
    p: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.optional <= self.keep:
            raise ValueError(f"optional is {self.optional} and keep is {self.keep}; give 0 <= optional <= keep.")
        if not 0 < self.p < 1:
            raise ValueError(f"p is {self.p}; give a number between 0 and 1.")

    def __str__(self) -> str:
        return (
            f"keep: better by more than {self.keep:g} points, p < {self.p:g} (paired t-test over seeds, Holm-corrected "
            "over all comparisons of the metric), and 0 outside of the 95% interval (over seeds and test items). "
            f"optional: better by {self.optional:g} points or more, but not keep. drop: less than that, or unstable: "
            "the standard deviation of the differences over seeds exceeds their mean. Fewer than 3 seeds: none."
        )


@dataclass
class QuickRuns:
    """What `--quick` makes of the experiment: each run is cut down as by `kv-trainer train --quick`, then changed."""

    seeds: int = field(default=3, metadata={"help": "The first so many seeds at most."})
    arms: list[str] = field(default_factory=list, metadata={"help": "Only these; default all."})
    overrides: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of the recipe; they win."})

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; give 1 or more.")


@dataclass
class Unequal:
    """What an arm is not given alike, because that is what is studied."""

    what: list[str] = field(default_factory=list, metadata={"help": "Such as [train_rows, order, tokens]."})
    why: str = field(default="", metadata={"help": "Shown in the report."})

    def __post_init__(self) -> None:
        if not self.what or not self.why:
            raise ValueError(f"unequal needs both what and why; what: {', '.join(MAY_DIFFER)}.")
        self.why = " ".join(self.why.split())  # it is a sentence of the report
        for name in self.what:
            if name not in MAY_DIFFER:
                guess = suggest(name, list(MAY_DIFFER))
                raise ValueError(f"unequal.what names '{name}'.{guess} It may be {', '.join(MAY_DIFFER)}.")


@dataclass
class Arm:
    """One way of training: the recipe with some settings changed."""

    set: dict[str, Any] = field(default_factory=dict, metadata={"help": "losses.kv.weight: 3, teachers: null, ..."})
    like: str | None = field(default=None, metadata={"help": "Begin with the settings of this arm."})
    seconds_of: str | None = field(
        default=None, metadata={"help": "As many steps as this arm's seconds allow, at the pace of `like`."}
    )
    with_store: bool = field(
        default=False, metadata={"help": "seconds_of: and the seconds that filling the store of its teachers took."}
    )
    against: str | None = field(default=None, metadata={"help": "Compare it with this arm, not the experiment's."})
    also_against: list[str] = field(
        default_factory=list, metadata={"help": "And with these, where their runs are there."}
    )
    control: bool = field(default=False, metadata={"help": "It is to show that the gain is not an accident."})
    unequal: Unequal | None = field(default=None, metadata={"help": "What may differ, and why."})
    where: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.seconds_of and not self.like:
            raise ValueError("seconds_of needs 'like', the arm whose pace is measured; add like: ARM.")
        if self.with_store and not self.seconds_of:
            raise ValueError("with_store has no effect without seconds_of, the arm whose teachers were stored.")


@dataclass
class Experiment:
    recipe: str = field(default="", metadata={"help": "The base recipe, a path from this file."})
    output_dir: str = ""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    against: str = field(default="", metadata={"help": "What arms are compared with; default the first."})
    metrics: list[str] = field(
        default_factory=lambda: ["accuracy", "perplexity"], metadata={"help": "The first is the one judged."}
    )
    processes: int = field(default=1, metadata={"help": "Runs at a time."})
    clock: Literal["wall", "processor"] = field(
        default="wall", metadata={"help": "Seconds of the wall, or of processor time, where others compute too."}
    )
    runs_from: list[str] = field(
        default_factory=list,
        metadata={"help": "Other experiments' output_dir, or a published runs.zip: runs of the same settings count."},
    )
    launcher: list[str] = field(default_factory=list, metadata={"help": "Such as [accelerate, launch]."})
    verdict: VerdictRule = field(default_factory=VerdictRule)
    overrides: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of the recipe for all arms."})
    quick: QuickRuns = field(default_factory=QuickRuns)
    arms: dict[str, Arm] = field(default_factory=dict, init=False)
    path: str = field(default="", init=False)
    is_quick: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give one or more, each once.")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds is {self.seeds}; give numbers from 0 to {2**32 - 1:,}.")
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}; give 1 or more.")
        if self.processes > 1 and any(Path(word).name in TAKE_ALL for word in self.launcher):
            raise ValueError("processes and launcher: each launched run would take all devices; set processes: 1.")
        self.check_launcher()
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics is {self.metrics}; name one or more, such as accuracy, each once.")
        for name in self.metrics:
            if name not in METRICS and not name.startswith("accuracy_"):
                known = [*METRICS, "accuracy_TASK"]
                raise ValueError(f"metrics names '{name}'.{suggest(name, known)} It may be {', '.join(known)}.")

    def check_launcher(self) -> None:
        if self.runs_from and self.launcher:
            raise ValueError("runs_from has no use with a launcher: other runs were not launched so. Leave one out.")

    def compared_with(self, name: str) -> str:
        return self.arms[name].against or self.against

    def pairs(self, arms: Sequence[str]) -> list[tuple[str, str]]:
        """Which arms are compared with which, of these: each with its own first, then with the further ones."""
        found = [(name, self.compared_with(name)) for name in arms if name != self.against]
        found += [(name, other) for name in arms for other in self.arms[name].also_against]
        return [pair for pair in dict.fromkeys(found) if pair[0] != pair[1] and pair[1] in arms]

    def settings(self, name: str) -> dict[str, Any]:
        """The changed settings of an arm, dotted name -> value; what comes later wins."""
        found, chain = dict(self.overrides), [name]
        while like := self.arms[chain[-1]].like:
            chain.append(like)
        for one in reversed(chain):
            for key, value in self.arms[one].set.items():
                found.pop(key, None)  # at its own place in the order: `teachers: null` clears what came before
                found[key] = value
        return {**found, **self.quick.overrides} if self.is_quick else found

    def training(self, name: str) -> dict[str, Any]:
        """What an arm changes of the training section but its length, name -> value."""
        found: dict[str, Any] = {}
        for key, value in self.settings(name).items():
            if key == "training" and isinstance(value, Mapping):
                found |= value
            elif key.startswith("training."):
                found[key.removeprefix("training.")] = value
        found.pop("max_steps", None)
        return found

    def needed(self, chosen: Sequence[str]) -> list[str]:
        """The chosen arms and those they cannot do without, each after the arms it waits for."""
        order: list[str] = []

        def add(name: str) -> None:
            arm = self.arms[name]
            for other in (arm.like, arm.seconds_of) if arm.seconds_of else ():
                add(str(other))
            if name not in order:
                order.append(name)

        wanted, grown = {self.against, *chosen}, True
        while grown:  # what comes in as another's need is compared with an arm of its own
            order.clear()
            for name in self.arms:  # in the order of the file
                if name in wanted:
                    add(name)
            more = {*order, *map(self.compared_with, order)}
            grown, wanted = more != wanted, more
        return order


def is_experiment(path: str | os.PathLike[str]) -> bool:
    """Whether a YAML file has `arms` at its top level."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "arms" in content


def load_experiment(path: str | os.PathLike[str], quick: bool = False) -> Experiment:
    """An experiment file as dataclasses. RecipeError, one line that says where, for what is wrong in it."""
    tree = read_file(Path(path), str(path))
    known = [f.name for f in fields(Experiment) if f.init] + ["arms"]
    for key, node in tree.value.items():
        if key not in known:
            raise unknown(key, "", node, known)
    arms = tree.value.pop("arms", None)
    if arms is None or not arms.value:
        raise RecipeError(f"arms is missing in {path}; give arms: {{NAME: {{set: ...}}, ...}}.")
    experiment = build(Experiment, tree, "")
    experiment.path, experiment.is_quick = str(path), quick
    for name, node in mapping(arms, "arms").items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise RecipeError(f"The arm '{name}' {node.where} needs a name of letters, digits, _ . and - only.")
        experiment.arms[name] = build(Arm, node, f"arms.{name}")
        experiment.arms[name].where = node.where
    check_names(experiment, tree, arms)
    set_places(experiment, tree, Path(path))
    return experiment


def check_names(experiment: Experiment, tree: Node, arms: Node) -> None:
    """Every arm that is named must be there, and no arm may lead back to itself."""
    names = list(experiment.arms)
    experiment.against = experiment.against or names[0]
    named = [("against", experiment.against, tree.at("against"))]
    named += [("quick.arms", name, tree.at("quick", "arms")) for name in experiment.quick.arms]
    changed = {"overrides": experiment.overrides, "quick.overrides": experiment.quick.overrides}
    changed |= {f"arms.{name}": arm.set for name, arm in experiment.arms.items()}
    for where, settings in changed.items():
        for key in names_in(settings):
            if key in OURS:
                raise RecipeError(f"{where} sets {key}, which would be ignored: an experiment has its own {OURS[key]}.")
            if key.endswith("token"):
                raise RecipeError(f"{where} sets {key}, which the report would show; set HF_TOKEN in the environment.")
    for name, arm in experiment.arms.items():
        for key in ("like", "seconds_of", "against"):
            if other := getattr(arm, key):
                named.append((f"arms.{name}.{key}", other, arms.at(name, key)))
        named += [(f"arms.{name}.also_against", other, arms.at(name, "also_against")) for other in arm.also_against]
        for key, others in (("against", [arm.against]), ("also_against", arm.also_against)):
            if name in others:
                raise RecipeError(f"arms.{name}.{key} {arms.at(name, key)} names the arm itself; name another.")
    for key, name, where in named:
        if name not in names:
            raise RecipeError(f"{key} {where} is '{name}', which is no arm.{suggest(name, names)} {', '.join(names)}.")
    if experiment.arms[experiment.against].against:
        where = arms.at(experiment.against, "against")
        raise RecipeError(f"arms.{experiment.against}.against {where} has no effect: all others are compared with it.")
    for name in names:
        seen, waiting = {name}, [name]
        while waiting:
            arm = experiment.arms[waiting.pop()]
            others = [other for other in (arm.like, arm.seconds_of) if other]
            if name in others:
                raise RecipeError(f"arms.{name} {arms.at(name)} leads back to itself by like or seconds_of.")
            waiting += [other for other in others if other not in seen]
            seen.update(others)


def names_in(settings: Mapping[Any, Any], before: str = "") -> Iterator[str]:
    """The name of every setting, also of those in a section that is given whole."""
    for key, value in settings.items():
        yield f"{before}{key}"
        if isinstance(value, Mapping):
            yield from names_in(value, f"{before}{key}.")


def set_places(experiment: Experiment, tree: Node, path: Path) -> None:
    """The recipe as a path from here, and output_dir as recipes have it: from here too."""
    if not experiment.recipe:
        raise RecipeError(f"recipe is missing in {path}; give recipe: ./recipe.yaml, a path from this file.")
    target = os.path.abspath(path.parent / experiment.recipe)
    if not os.path.isfile(target):
        where = tree.at("recipe")
        raise RecipeError(f"recipe {where} is '{experiment.recipe}', which does not exist (looked for {target}).")
    experiment.recipe = os.path.relpath(target) if Path(target).is_relative_to(os.getcwd()) else target
    default = os.path.join("outputs", path.resolve().parent.name, path.stem)
    folder = (experiment.output_dir or default).rstrip("/\\")
    quick = "-quick" * experiment.is_quick
    experiment.output_dir = folder + quick
    others = [other.rstrip("/\\") for other in experiment.runs_from]
    experiment.runs_from = [other + quick * (not os.path.isfile(other)) for other in others]
