"""What each teacher contributes: leave-one-out and Shapley values over arms that have each subset of the teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import yaml

from .jobs import Job
from .results import Study
from .statistics import lower_is_better

Team = frozenset[str]


@dataclass
class Game:
    """players: the teachers. worth: every subset of them -> one value a seed, more is better. whole: the arm of all."""

    players: list[str]
    worth: Mapping[Team, list[float]]
    whole: str


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


def find_game(study: Study) -> Game | None:
    """The arms that differ in nothing but which teachers they have, where every subset is there; of the best whole."""
    metric = study.experiment.metrics[0]
    sign = -1.0 if lower_is_better(metric) else 1.0
    plain = [a for a in study.arms if not (study.experiment.arms[a].control or study.experiment.arms[a].seconds_of)]
    recipes = {arm: yaml.safe_load(Job(study.experiment, arm, study.seeds[0]).recipe_text()) for arm in plain}
    worths = {arm: [sign * value for value in study.values[arm][metric]] for arm in plain}
    best: Game | None = None
    for whole in plain:
        players = sorted(recipes[whole]["teachers"])
        if len(players) < 2:
            continue
        teams = [frozenset(team) for size in range(len(players) + 1) for team in combinations(players, size)]
        arms = {team: find_arm(recipes, whole, team) for team in teams}
        if all(arms.values()):
            game = Game(players, {team: worths[str(arm)] for team, arm in arms.items()}, whole)
            if best is None or sum(worths[whole]) > sum(worths[best.whole]):
                best = game
    return best


def find_arm(recipes: Mapping[str, Any], whole: str, team: Team) -> str | None:
    """The arm that is as `whole`, with this team of its teachers."""
    wanted = stripped(recipes[whole], team)
    return next((arm for arm, r in recipes.items() if set(r["teachers"]) == team and stripped(r, team) == wanted), None)


def stripped(recipe: Mapping[str, Any], team: Team) -> dict[str, Any]:
    """A recipe's settings for a team: without what cannot matter to so many teachers, nor where it is written."""
    found = {**recipe, "teachers": {name: recipe["teachers"].get(name) for name in team}}
    found["training"] = {k: v for k, v in recipe["training"].items() if k != "output_dir"}
    if len(team) < 2:
        del found["fusion"]
    if not team:
        for key in ("alignment", "projector"):
            del found[key]
        found["losses"] = {"cross_entropy": recipe["losses"]["cross_entropy"]}
    return found
