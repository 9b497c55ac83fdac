"""The runs of an experiment: which command each is, and what it left if it is finished."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..arguments import Recipe
from ..files import read_json
from ..manifest import differences
from ..recipe_tree import RecipeError
from ..recipes import dump_recipe, load_recipe, saved_recipe, settings_of
from .experiment import Experiment
from .fingerprints import hash_inputs

RECORD, LOG = "arm.json", "log.txt"
NEEDED = ("seed", "steps", "tokens", "clocks", "metrics", "machine")  # what a report cannot do without
REMOVE = "Remove it to run it again, or give another output_dir."
HERE = "in the experiment"  # where messages say that what an arm changes was written


@dataclass(frozen=True, eq=False)
class Job:
    """One run: an arm with a seed."""

    experiment: Experiment
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.experiment.output_dir) / f"{self.arm}-{self.seed}"

    @property
    def waits_for(self) -> list[tuple[str, int]]:
        """The runs whose seconds say how long this one is."""
        arm = self.experiment.arms[self.arm]
        return [(str(other), self.seed) for other in (arm.like, arm.seconds_of)] if arm.seconds_of else []

    def overrides(self, max_steps: int | None = None, folder: Path | None = None) -> list[str]:
        """What the command line of this run has behind the recipe."""
        settings = self.experiment.settings(self.arm)
        settings |= {} if max_steps is None else {"training.max_steps": max_steps}
        settings |= {"training.seed": self.seed, "training.output_dir": (folder or self.folder).as_posix()}
        words = [word for key, value in settings.items() for word in as_words(key, as_word(value))]
        return (["--quick"] if self.experiment.is_quick else []) + words

    def recipe(self, max_steps: int | None = None) -> Recipe:
        """The recipe of this run. RecipeError names the arm."""
        words = [word for word in self.overrides(max_steps) if word != "--quick"]
        arm = self.experiment.arms[self.arm]
        try:
            return load_recipe(self.experiment.recipe, words, self.experiment.is_quick, HERE)
        except RecipeError as error:
            raise RecipeError(f"arms.{self.arm} {arm.where}: {error}") from error

    def recipe_text(self, max_steps: int | None = None) -> str:
        """The recipe of this run as it is resolved."""
        return dump_recipe(self.recipe(max_steps))

    @property
    def spread(self) -> bool:
        """Whether a teacher has a device_map."""
        teachers = (yaml.safe_load(self.recipe_text()).get("teachers") or {}).values()
        return any((teacher or {}).get("device_map") for teacher in teachers)

    def record(self) -> dict[str, Any] | None:
        """What the finished run left; None where it is not finished. ValueError if it is of other settings or files."""
        path = self.folder / RECORD
        if not path.exists():
            return None
        record = read_record(path)
        now = settings_of(self.recipe_text(self.given_steps(record)))
        found = differences(settings_of(saved_recipe(self.folder)), now)
        if found:
            raise ValueError(f"{self.folder} holds a finished run of other settings: {'; '.join(found)}. {REMOVE}")
        if changed := changed_since(record, now):
            raise ValueError(f"{self.folder} holds a finished run of what {' and '.join(changed)} was before. {REMOVE}")
        clock = record["clocks"][self.experiment.clock]
        return {**record, "clock": clock, "seconds": clock[-1]}

    def given_steps(self, record: Mapping[str, Any]) -> int | None:
        """The steps that another arm's seconds gave a run; None where none did."""
        if self.experiment.arms[self.arm].seconds_of is None:
            return None
        return int(record.get("max_steps") or record["steps"])

    def check_time(self, records: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
        """ValueError if this finished run is as long as another arm's took once, but not as that of today."""
        given, steps = self.given_steps(records[self.arm, self.seed]), equal_steps(self, records)
        if given != steps:
            raise ValueError(
                f"{self.folder} was given {given} steps; by the seconds of the arms it depends on it would be {steps} "
                "now. Remove it to run it again."
            )

    def shown(self, record: Mapping[str, Any]) -> str:
        """The command that makes this run again, without this experiment, and beside it: nothing is overwritten."""
        launcher = self.experiment.launcher
        start = [*launcher, "-m", "kv_trainer", "train"] if launcher else ["kv-trainer", "train"]
        steps, beside = self.given_steps(record), self.folder.with_name(f"{self.folder.name}-again")
        threads = [f"OMP_NUM_THREADS={record['threads']}"] if record.get("threads") else []
        return " ".join([*threads, shlex.join([*start, self.experiment.recipe, *self.overrides(steps, beside)])])


def changed_since(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What a recipe names whose files are no longer those that a run was made of, as far as record and machine know."""
    then, now = record.get("inputs") or {}, hash_inputs(recipe)
    return [place for place in then if place in now and then[place] != now[place]]


def read_record(path: Path) -> dict[str, Any]:
    """What a finished run left; ValueError names a file that is none."""
    record = read_json(path)
    missing = [key for key in NEEDED if not (isinstance(record, dict) and key in record)]
    if missing:
        raise ValueError(f"{path} is no record of a run: it has no {', '.join(missing)}. Remove its folder.")
    return dict(record)


def as_words(key: str, value: str) -> list[str]:
    """An override; a value that looks like an option is written with it as one word."""
    return [f"--{key}={value}"] if value.startswith("--") else [f"--{key}", value]


def as_word(value: Any) -> str:
    """A setting's value as the command line takes it: YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def equal_steps(job: Job, records: Mapping[tuple[str, int], Mapping[str, Any]]) -> int | None:
    """How many steps of `like` take as long as `seconds_of` did, with the same seed; None for other arms."""
    arm = job.experiment.arms[job.arm]
    if arm.seconds_of is None:
        return None
    pace, given = records[str(arm.like), job.seed], given_seconds(job.experiment, job.arm, job.seed, records)
    return max(1, round(given / (pace["seconds"] / pace["steps"])))


def given_seconds(
    experiment: Experiment, name: str, seed: int, records: Mapping[tuple[str, int], Mapping[str, Any]]
) -> float:
    """What `seconds_of` gives an arm, and `with_store` what filling the store took that its teachers were read from."""
    arm = experiment.arms[name]
    other = records[str(arm.seconds_of), seed]
    if not arm.with_store:
        return float(other["seconds"])
    took = (other.get("pass_seconds") or {}).get(experiment.clock)
    if not took:
        raise ValueError(
            f"arms.{name}.with_store: {arm.seconds_of} read no store, or one whose filling nobody timed; leave it out, "
            "or precompute the store anew."
        )
    return float(other["seconds"]) + float(took)
