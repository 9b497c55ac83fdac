"""What is wrong with the arms of an experiment, or without effect, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from ..arguments import Recipe
from ..blueprint import check_models
from ..checks import check_wrong, ignored
from ..manifest import differences
from ..recipes import settings_of
from .experiment import Experiment, load_experiment, names_in
from .jobs import Job
from .shared import without_place


def check_arms(experiment: Experiment) -> None:
    """ValueError, before anything runs, for an arm whose recipe does not resolve, or cannot be compared."""
    settings = {arm: settings_of(Job(experiment, arm, experiment.seeds[0]).recipe_text()) for arm in experiment.arms}
    check_metrics(experiment, settings)
    for arm, found in settings.items():
        where = f"arms.{arm} {experiment.arms[arm].where}"
        check_alone(Job(experiment, arm, experiment.seeds[0]).recipe(), where)
        if found["training"].get("push_to_hub"):
            raise ValueError(
                f"{where} has training.push_to_hub: every run, controls too, would be pushed to one repository. Set "
                "overrides: {training.push_to_hub: false}, and push the run you choose with `kv-trainer train`."
            )
        ours, theirs = ({"evaluation": judged(one)} for one in (found, settings[experiment.against]))
        wrong = differences(theirs, ours)
        if wrong:
            raise ValueError(
                f"{where} is evaluated in another way than {experiment.against} ({'; '.join(wrong)}), so their "
                "metrics could not be compared. Set it for all arms, under overrides."
            )


def check_metrics(experiment: Experiment, settings: Mapping[str, dict[str, Any]]) -> None:
    """ValueError for a metric that an arm's evaluation would not give, known when all runs are done."""
    for arm, found in settings.items():
        if not found["data"]["eval_split"]:
            where = experiment.arms[arm].where
            raise ValueError(f"arms.{arm} {where} has no data.eval_split, so nothing would be measured; give one.")
        asked = [name for name in experiment.metrics if name.startswith("accuracy")]
        if asked and not found["evaluation"]["generate"]:
            raise ValueError(
                f"metrics names '{asked[0]}', but arms.{arm} has evaluation.generate: false; set it to true, or "
                "metrics: [perplexity]."
            )


def check_alone(recipe: Recipe, where: str) -> None:
    """ValueError for what the run of an arm would refuse, perhaps hours from now. where: of the arm."""
    try:
        check_wrong(recipe.args)
        check_models(recipe)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def judged(settings: dict[str, Any]) -> dict[str, Any]:
    """How a run is evaluated, by its settings; a batch's size changes nothing but rounding."""
    return {key: value for key, value in settings["evaluation"].items() if key != "batch_size"}


def twins(experiment: Experiment) -> list[tuple[str, str]]:
    """Arms whose runs differ in nothing but the name: a change that was meant has no effect."""
    names = [name for name, arm in experiment.arms.items() if not arm.seconds_of]
    texts = {name: Job(experiment, name, experiment.seeds[0]).recipe_text() for name in names}
    each = {name: without_place(settings_of(text)) for name, text in texts.items()}
    return [(one, other) for one, other in combinations(names, 2) if each[one] == each[other]]


def without_effect(experiment: Experiment) -> list[str]:
    """What the file sets for an arm that does nothing there; what the recipe sets is not said of every arm again."""
    found = []
    for name in experiment.arms:
        recipe = Job(experiment, name, experiment.seeds[0]).recipe()
        given = [*names_in(experiment.settings(name))]
        for message in ignored(recipe.args, recipe.weights):
            setting = message.partition(" has no effect")[0]
            if any(f"{key}.".startswith(f"{setting}.") for key in given):
                found.append(f"arms.{name} {experiment.arms[name].where}: {message}")
    return found


def idle(experiment: Experiment) -> list[str]:
    """What the file says without any effect, a sentence each."""
    same = [f"{one} and {other} are one and the same: their settings do not differ" for one, other in twins(experiment)]
    return same + without_effect(experiment)


def describe(path: str, quick: bool = False) -> tuple[str, list[str]]:
    """The line of `kv-trainer validate` for an experiment file, and what it should be warned of."""
    experiment = load_experiment(path, quick)
    check_arms(experiment)
    runs = len(experiment.arms) * len(experiment.seeds)
    arms = ", ".join(experiment.arms)
    return f"ok {path}: {runs} runs of {experiment.recipe}: {arms}; against {experiment.against}", idle(experiment)
