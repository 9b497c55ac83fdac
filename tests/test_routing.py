"""Mean shares by task and by layer, against the mean written out; and the files that a run leaves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import World

from kv_trainer.losses import CrossEntropy, KVRelationLoss
from kv_trainer.manifest import MANIFEST_FILE
from kv_trainer.routing import ROUTING_FILE, RoutingLog


def test_means_by_task_and_by_layer(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    log = RoutingLog(["a", "b", "c"], ["sums", "words"], 2)
    shares = torch.softmax(torch.randn((4, 3, 2, 5), generator=generator), dim=1)  # four batches of five samples
    tasks = torch.randint(-1, 2, (4, 5), generator=generator)
    for x, of in zip(shares, tasks, strict=True):
        log.add(x, of)
    logs = log.logs(lambda x: x)
    assert logs["share_b"] == pytest.approx(float(shares[:, 1].mean()), rel=1e-5)
    where = tasks == 1
    assert logs["share_c/words"] == pytest.approx(float(shares[:, 2].mean(1)[where].mean()), rel=1e-5)
    assert log.logs(lambda x: x) == {}, "what was logged once is not logged again"
    log.save(tmp_path)
    saved = json.loads((tmp_path / "routing.json").read_text())
    assert saved["teachers"] == ["a", "b", "c"] and saved["tasks"] == ["sums", "words"]
    torch.testing.assert_close(torch.tensor(saved["layer"]), shares.mean((0, 3)).T)
    by_task = torch.stack([shares.mean(2).transpose(1, 2)[tasks == t].mean(0) for t in (0, 1)])
    torch.testing.assert_close(torch.tensor(saved["task"]), by_task)
    assert {p.name for p in tmp_path.iterdir()} == {"routing.json", "routing_task.png", "routing_layer.png"}


def test_equal_layers_and_no_tasks_make_no_picture(tmp_path: Path) -> None:
    log = RoutingLog(["a", "b"], [], 3)
    log.add(torch.tensor([[0.25, 0.5], [0.75, 0.5]]), None)
    assert log.logs(lambda x: x) == {"share_a": 0.375, "share_b": 0.625}
    for name in ("routing_layer.png", "routing_notes.txt"):  # an older run's, and the user's
        (tmp_path / name).write_text("")
    log.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"routing.json", "routing_notes.txt"}


def test_a_run_that_goes_on_counts_what_was_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also what was not logged yet, and of all ranks: here of two that are alike."""

    def both(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    shares = torch.softmax(torch.randn((5, 2, 3), generator=torch.Generator().manual_seed(0)), dim=1)
    tasks = torch.tensor([0, 1, -1])
    log, again = (RoutingLog(["a", "b"], ["sums", "words"], 2) for _ in range(2))
    for i, x in enumerate(shares):
        log.add(x, tasks)
        if i == 1:
            log.logs(both)
        if i == 2:
            log.write_state(tmp_path, log.so_far(both))
    log.finish(both)
    again.add(shares[0], tasks)  # of another run before
    again.restart(tmp_path)
    for x in shares[3:]:
        again.add(x, tasks)
    again.finish(both)
    assert log.total is not None and again.total is not None and not caplog.records
    assert float(log.total.sum()) == pytest.approx(2 * 5 * 3 * 2), "ranks, batches, samples and layers"
    torch.testing.assert_close(again.total, log.total)
    for kept, says in ((tmp_path / "older", f"has no {ROUTING_FILE}"), (tmp_path, "is of other tasks")):
        other = RoutingLog(["a", "b"], ["sums"], 2)
        other.restart(kept, main=False)
        assert not caplog.records, "one rank warns"
        with caplog.at_level(logging.WARNING):
            other.restart(kept)
        assert other.total is None and f"{kept} {says}: routing.json will be of the steps that follow" in caplog.text
        caplog.clear()
    RoutingLog(["a"], [], 2).restart(tmp_path / "older")
    assert not caplog.records, "of one teacher there is nothing to tell"


def test_routing_of_a_resumed_run_is_that_of_the_uninterrupted_one(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint falls between two logs, and so does the end."""
    world = World(tiny_model, tiny_tokenizer)
    losses = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()}
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "save_total_limit": 5}
    checkpoint, found = tmp_path / "whole" / "checkpoint-3", {}
    for name in ("whole", "resumed", "older"):
        trainer = world.trainer(tmp_path / name, losses, **options)
        if name == "older":
            (checkpoint / ROUTING_FILE).unlink()
            manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
            assert manifest["files"].pop(ROUTING_FILE), "a checkpoint without it is not whole"
            (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
        trainer.train(resume_from_checkpoint=None if name == "whole" else str(checkpoint))
        assert (f"has no {ROUTING_FILE}" in caplog.text) == (name == "older")
        trainer.routing.save(tmp_path / name)
        found[name] = torch.tensor(json.loads((tmp_path / name / "routing.json").read_text())["layer"])
        samples = float(trainer.routing.total.sum()) / trainer.student_shape.num_layers
        assert samples == pytest.approx({"older": 8}.get(name, 18), abs=1e-3), "ten rows in steps of 4, 4, 2, 4, 4"
    torch.testing.assert_close(found["resumed"], found["whole"], atol=1e-5, rtol=0)
    assert (found["older"] - found["whole"]).abs().max() > 1e-4


def test_nothing_logged_leaves_nothing(tmp_path: Path) -> None:
    RoutingLog(["a", "b"], [], 3).save(tmp_path)
    assert not list(tmp_path.iterdir())
