"""Shapley values by their axioms, and by hand."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kv_trainer.experiments import contribution
from kv_trainer.experiments.contribution import Game, find_games, leave_one_out, shapley


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


def recipe(*teachers: str, relation: dict | None = None, **others) -> dict:
    losses = {"cross_entropy": {"weight": 1}}
    if teachers:
        losses["kv_relation"] = {"weight": 3, "parts": "both", "layers": "all"} | (relation or {})
    return {
        "teachers": {t: {"model": t} for t in teachers}, "fusion": {"method": "confidence"}, "alignment": {},
        "projector": {}, "losses": losses, "training": {"output_dir": f"{teachers} {relation}", "seed": 1}, **others,
    }  # fmt: skip


def study_of(
    runs: dict[str, tuple[float, dict]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int = 3
) -> SimpleNamespace:
    """A finished study: arm -> its accuracy and its recipe; of a student of so many layers."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "gpt2", "n_layer": {depth}}}')

    def job(experiment: object, arm: str, seed: int) -> SimpleNamespace:
        return SimpleNamespace(recipe_text=lambda: str(runs[arm][1]), folder=tmp_path)

    monkeypatch.setattr(contribution, "Job", job)
    arm = SimpleNamespace(control=False, seconds_of=None)
    experiment = SimpleNamespace(metrics=["accuracy"], arms=dict.fromkeys(runs, arm))
    values = {name: {"accuracy": [score]} for name, (score, _) in runs.items()}
    return SimpleNamespace(experiment=experiment, arms=list(runs), seeds=[1], values=values)


def test_arms_that_are_every_subset_of_the_teachers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"ce": (0.0, recipe()), "a": (0.4, recipe("a")), "b": (0.5, recipe("b")), "ab": (0.8, recipe("a", "b")),
            "even": (0.6, recipe("a", "b", fusion={"method": "uniform"})),
            "other": (0.9, recipe("a", "b", data={"path": "x"}))}  # fmt: skip
    study = study_of(runs, tmp_path, monkeypatch)
    (found,) = find_games(study)
    assert (found.whole, found.players, found.kind) == ("ab", ["a", "b"], "teacher") and found.complete
    assert shapley(found)["a"] == pytest.approx([0.35])
    study.arms = [name for name in runs if name != "b"]
    assert find_games(study) == []


def test_keys_play_against_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"ce": (0.1, recipe()), "both": (0.9, recipe("a")), "keys": (0.5, recipe("a", relation={"parts": "keys"})),
            "values": (0.7, recipe("a", relation={"parts": "values"})),
            "heavy": (0.95, recipe("a", relation={"parts": "keys", "weight": 9}))}  # fmt: skip
    (found,) = find_games(study_of(runs, tmp_path, monkeypatch))
    assert (found.whole, found.players, found.kind) == ("both", ["keys", "values"], "part") and found.complete
    assert shapley(found) == {"keys": pytest.approx([0.3]), "values": pytest.approx([0.5])}


def test_each_layer_is_left_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All subsets of many layers would be too many runs: what is lost without each is known, Shapley values are not."""
    without = {"no_0": (0.6, [1, 2]), "no_1": (0.8, [0, 2]), "no_2": (0.3, [0, 1]), "first": (0.2, [0])}
    runs = {"all": (0.9, recipe("a"))}
    runs |= {name: (score, recipe("a", relation={"layers": layers})) for name, (score, layers) in without.items()}
    (found,) = find_games(study_of(runs, tmp_path, monkeypatch))
    assert found.kind == "layer" and not found.complete
    lost = leave_one_out(found)
    assert lost == {f"layer {i}": pytest.approx([x]) for i, x in enumerate((0.3, 0.1, 0.6))}
    assert find_games(study_of(runs, tmp_path, monkeypatch, depth=4)) == [], "without one arm the game is not whole"
