"""The pictures of a report."""

from __future__ import annotations

import logging
from pathlib import Path

from ...recipes import load_recipe
from ..contribution import find_game
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
    for old in folder.glob("*.png"):
        old.unlink()
    metric = study.experiment.metrics[0]
    draw_bars(study, folder / "arms.png")
    found = {"arms.png": f"{metric} by arm and task: mean, standard deviation over seeds, and each seed as a dot"}
    there = reached(study)
    if there is not None:
        found["curves.png"] = draw_curves(study, folder / "curves.png")
        draw_reached(study, there, folder / "reached.png")
        against = study.experiment.against
        found["reached.png"] = f"steps and seconds until the training loss with which {against} ends (same seed)"
    found |= draw_routing(study, folder)
    game = find_game(study)
    if game is not None:
        draw_contribution(study, game, folder / "contribution.png")
        found["contribution.png"] = f"what each teacher of {game.whole} contributes, by the arms that have fewer"
    taught = taught_arm(study)
    if taught is not None:
        if draw_terms(study, taught, folder / "terms.png"):
            found["terms.png"] = f"share of each weighted term in the loss of {taught} over its steps"
        job = Job(study.experiment, taught, study.seeds[0])
        words = [word for word in job.overrides() if word != "--quick"]
        if draw_alignment(load_recipe(study.experiment.recipe, words), folder / "alignment.png"):
            found["alignment.png"] = "one training row: a line where teacher and student have read the same text"
    return found


def taught_arm(study: Study) -> str | None:
    """The best arm that has teachers, else any that has."""
    best = study.best()
    order = ([best] if best else []) + [arm for arm in study.arms if arm != best]

    def terms(arm: str) -> int:
        first = (study.metrics(arm, study.seeds[0]) or [{}])[0]
        return sum(name.startswith("weight_") for name in first)

    return next((arm for arm in order if terms(arm) > 1), None)
