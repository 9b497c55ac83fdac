"""Mean shares by task and by layer, against the mean written out; and the files that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kv_trainer.routing import RoutingLog


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
    log.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["routing.json"]


def test_nothing_logged_leaves_nothing(tmp_path: Path) -> None:
    RoutingLog(["a", "b"], [], 3).save(tmp_path)
    assert not list(tmp_path.iterdir())
