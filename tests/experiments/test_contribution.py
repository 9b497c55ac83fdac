"""Shapley values by their axioms, and by hand."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from kv_trainer.experiments import contribution
from kv_trainer.experiments.contribution import Game, find_game, leave_one_out, shapley


def game(players: str, worth) -> Game:
    teams = [frozenset(t) for n in range(len(players) + 1) for t in combinations(players, n)]
    return Game(list(players), {team: worth(team) for team in teams}, "all")


def test_two_teachers_by_hand() -> None:
    worth = {"": 0.0, "a": 0.5, "b": 0.3, "ab": 0.9}
    given = game("ab", lambda team: [worth["".join(sorted(team))], 0.0])
    found = shapley(given)
    assert found["a"] == pytest.approx([0.55, 0.0]) and found["b"] == pytest.approx([0.35, 0.0])
    assert leave_one_out(given) == {"a": pytest.approx([0.6, 0.0]), "b": pytest.approx([0.4, 0.0])}


def test_values_add_up_and_equals_get_the_same() -> None:
    generator = np.random.default_rng(0)
    table = {frozenset(t): generator.random(3).tolist() for n in range(5) for t in combinations("abcd", n)}
    found = shapley(game("abcd", table.__getitem__))
    gain = np.subtract(table[frozenset("abcd")], table[frozenset()])
    np.testing.assert_allclose(sum(map(np.array, found.values())), gain)

    def symmetric(team: frozenset) -> list[float]:  # c counts for nothing, a and b for the same
        return [float(len(team & set("ab")) ** 2)]

    found = shapley(game("abc", symmetric))
    assert found == {"a": [2.0], "b": [2.0], "c": [0.0]}


def recipe(*teachers: str, **others) -> str:
    losses = {"cross_entropy": {"weight": 1}} | ({"kv_relation": {"weight": 3}} if teachers else {})
    content = {
        "teachers": {t: {"model": t} for t in teachers}, "fusion": {"method": "confidence"}, "alignment": {},
        "projector": {}, "losses": losses, "training": {"output_dir": str(teachers), "seed": 1}, **others,
    }  # fmt: skip
    return str(content)


def test_arms_that_are_every_subset_of_the_teachers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"ce": recipe(), "a": recipe("a"), "b": recipe("b"), "ab": recipe("a", "b"),
             "even": recipe("a", "b", fusion={"method": "uniform"}), "other": recipe("a", "b", data={"path": "x"})}
    monkeypatch.setattr(
        contribution, "Job", lambda e, arm, seed: SimpleNamespace(recipe_text=lambda: texts[arm])
    )  # fmt: skip
    arm = SimpleNamespace(control=False, seconds_of=None)
    experiment = SimpleNamespace(metrics=["accuracy"], arms=dict.fromkeys(texts, arm))
    scores = {"ce": 0.0, "a": 0.4, "b": 0.5, "ab": 0.8, "even": 0.6, "other": 0.9}
    values = {name: {"accuracy": [score]} for name, score in scores.items()}
    study = SimpleNamespace(experiment=experiment, arms=list(texts), seeds=[1], values=values)
    found = find_game(study)
    assert found.whole == "ab" and found.players == ["a", "b"]
    assert shapley(found)["a"] == pytest.approx([0.35])
    study.arms = [name for name in texts if name != "b"]
    assert find_game(study) is None
