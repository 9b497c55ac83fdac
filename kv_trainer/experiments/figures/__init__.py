"""The pictures of a report."""

from __future__ import annotations

import logging
from pathlib import Path

from ...arguments import Recipe
from ...recipes import load_recipe
from ..contribution import find_games
from ..jobs import Job
from ..reach import reached
from ..results import Study
from .bars import draw_bars, draw_reached
from .curves import draw_curves, draw_terms
from .shares import draw_contribution, draw_routing
from .tokens import draw_alignment

__all__ = ["draw_all"]
logger = logging.getLogger(__name__)


def draw_all(study: Study, folder: Path) -> dict[str, str]:
    """Every picture that the runs have the figures for, in the order of the report: file name -> caption."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for draw in (bars, training, draw_routing, games, terms, alignment):
        try:
            found |= draw(study, folder)
        except Exception as error:  # the numbers are of hours of work, and stand without it
            logger.warning("A picture is missing from the report, %s: %r", draw.__name__, error, exc_info=error)
    for old in folder.glob("*.png"):
        if old.name not in found:
            old.unlink()
    return found


def bars(study: Study, folder: Path) -> dict[str, str]:
    draw_bars(study, folder / "arms.png")
    metric = study.experiment.metrics[0]
    return {"arms.png": f"{metric} by arm and task: mean, standard deviation over seeds, and each seed as a dot"}


def training(study: Study, folder: Path) -> dict[str, str]:
    there = reached(study)
    if there is None:
        return {}
    caption = draw_curves(study, folder / "curves.png")
    draw_reached(study, there, folder / "reached.png")
    against = study.experiment.against
    until = f"steps and seconds until the training loss with which {against} ends (same seed)"
    return {"curves.png": caption, "reached.png": until}


def games(study: Study, folder: Path) -> dict[str, str]:
    found = {}
    for game in find_games(study):
        name = "contribution.png" if game.kind == "teacher" else f"contribution_{game.kind}s.png"
        draw_contribution(study, game, folder / name)
        found[name] = f"what each {game.kind} of {game.whole} contributes, by the arms that have fewer"
    return found


def terms(study: Study, folder: Path) -> dict[str, str]:
    taught = taught_arm(study)
    if taught is None or not draw_terms(study, taught, folder / "terms.png"):
        return {}
    return {"terms.png": f"share of each weighted term in the loss of {taught} over its steps"}


def alignment(study: Study, folder: Path) -> dict[str, str]:
    if not draw_alignment(most_teachers(study), folder / "alignment.png"):
        return {}
    return {"alignment.png": "one training row: a line where teacher and student have read the same text"}


def most_teachers(study: Study) -> Recipe:
    """The recipe of the arm that has most of them."""
    recipes = []
    for arm in study.ranked():
        words = [word for word in Job(study.experiment, arm, study.seeds[0]).overrides() if word != "--quick"]
        recipes.append(load_recipe(study.experiment.recipe, words))
    return max(recipes, key=lambda recipe: len(recipe.teachers))


def taught_arm(study: Study) -> str | None:
    """The best arm whose loss has several terms."""

    def count(arm: str) -> int:
        first = (study.metrics(arm, study.seeds[0]) or [{}])[0]
        return sum(name.startswith("weight_") for name in first)

    return next((arm for arm in study.ranked() if count(arm) > 1), None)
