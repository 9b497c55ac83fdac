"""What each teacher, layer or part contributes: leave-one-out and Shapley values, over arms that lack some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import yaml
from transformers import AutoConfig

from ..losses.base import chosen_layers
from .jobs import Job
from .results import Study
from .shared import without_place
from .statistics import lower_is_better

Team = frozenset[str]
# What plays -> the knob of a loss that says who does; teachers have a section of their own.
KINDS = {"teacher": "", "part": "parts", "layer": "layers"}


@dataclass
class Game:
    """players: all of a kind. worth: teams of them -> one value a seed, more is better. whole: the arm of all."""

    players: list[str]
    worth: Mapping[Team, list[float]]
    whole: str
    kind: str = "teacher"

    @property
    def complete(self) -> bool:
        """Whether there is every team, as Shapley values need."""
        return len(self.worth) == 2 ** len(self.players)


def shapley(game: Game) -> dict[str, list[float]]:
    """Player -> one value a seed: its mean gain over all orders in which players may come in, by enumeration."""
    count, everybody = len(game.players), game.worth[frozenset(game.players)]
    found = {}
    for player in game.players:
        others = [other for other in game.players if other != player]
        total = [0.0] * len(everybody)
        for size in range(count):
            share = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for team in map(frozenset, combinations(others, size)):
                gains = zip(game.worth[team | {player}], game.worth[team], strict=True)
                total = [sum_ + share * (after - before) for sum_, (after, before) in zip(total, gains, strict=True)]
        found[player] = total
    return found


def leave_one_out(game: Game) -> dict[str, list[float]]:
    """Player -> one value a seed: what all are worth, less what they are worth without it."""
    everybody = frozenset(game.players)
    return {
        player: [a - b for a, b in zip(game.worth[everybody], game.worth[everybody - {player}], strict=True)]
        for player in game.players
    }


def measures(game: Game) -> dict[str, dict[str, list[float]]]:
    """Name of a measure -> player -> one value a seed: Shapley values where they are known, and leave-one-out."""
    found = {"Shapley value": shapley(game)} if game.complete else {}
    return {**found, "lost without it": leave_one_out(game)}


def find_games(study: Study) -> list[Game]:
    """For each kind of player the best whole of which there is every arm that lacks just one of them.

    Arms of one game differ in nothing but their team, and in what cannot matter to it.
    """
    plain = [a for a in study.arms if not (study.experiment.arms[a].control or study.experiment.arms[a].seconds_of)]
    jobs = {arm: Job(study.experiment, arm, study.seeds[0]) for arm in plain}
    recipes = {arm: yaml.safe_load(job.recipe_text()) for arm, job in jobs.items()}
    depths = {arm: student_layers(job) for arm, job in jobs.items()}
    found = (best_game(study, recipes, kind, depths) for kind in KINDS)
    return [game for game in found if game is not None]


def best_game(study: Study, recipes: Mapping[str, Any], kind: str, depths: Mapping[str, int]) -> Game | None:
    metric = study.experiment.metrics[0]
    sign = -1.0 if lower_is_better(metric) else 1.0
    worths = {arm: [sign * value for value in study.values[arm][metric]] for arm in recipes}
    teams = {arm: team_of(recipe, kind, depths[arm]) for arm, recipe in recipes.items()}
    best: Game | None = None
    for whole, players in teams.items():
        if players is None or len(players) < 2:
            continue
        alike = stripped(recipes[whole], kind)
        worth: dict[Team, list[float]] = {}
        for arm, team in teams.items():
            if team is not None and team <= players and stripped(recipes[arm], kind, team) == cut(alike, kind, team):
                worth.setdefault(team, worths[arm])
        game = Game(sorted(players, key=lambda one: (len(one), one)), worth, whole, kind)
        lacking = all(players - {player} in worth for player in players)
        if lacking and (best is None or sum(worths[whole]) > sum(worths[best.whole])):
            best = game
    return best


def student_layers(job: Job) -> int:
    """Of the checkpoint that a run left; 0 where it left none."""
    if not (job.folder / "config.json").exists():
        return 0
    with suppress(ValueError, OSError):  # of a family whose code is not here
        return int(AutoConfig.from_pretrained(job.folder).get_text_config().num_hidden_layers)
    return 0


def team_of(recipe: Mapping[str, Any], kind: str, depth: int) -> Team | None:
    """Who of this kind of player takes part in a run; None where that cannot be said."""
    if not recipe["teachers"]:
        return frozenset()
    if kind == "teacher":
        return frozenset(recipe["teachers"])
    chosen = [loss[KINDS[kind]] for loss in recipe["losses"].values() if KINDS[kind] in loss]
    if len(chosen) != 1:
        return None
    if kind == "part":
        return frozenset(("keys", "values") if chosen[0] == "both" else (chosen[0],))
    return frozenset(f"layer {i}" for i in chosen_layers(chosen[0], depth)) if depth else None


def stripped(recipe: Mapping[str, Any], kind: str, team: Team | None = None) -> dict[str, Any]:
    """A recipe without what says its team, nor where it is written; of a team, without what cannot matter to it."""
    found = without_place(recipe)
    if kind != "teacher":
        found["losses"] = {
            name: {k: v for k, v in loss.items() if k != KINDS[kind]} for name, loss in recipe["losses"].items()
        }
    return found if team is None else cut(found, kind, team)


def cut(recipe: Mapping[str, Any], kind: str, team: Team) -> dict[str, Any]:
    """A stripped recipe as a team of it would have it."""
    found = dict(recipe)
    if kind == "teacher":
        found["teachers"] = {name: recipe["teachers"].get(name) for name in team}
        if len(team) < 2:
            found.pop("fusion", None)
    if not team:
        for key in ("teachers", "fusion", "alignment", "projector"):
            found.pop(key, None)
        found["losses"] = {"cross_entropy": recipe["losses"]["cross_entropy"]}
    return found
