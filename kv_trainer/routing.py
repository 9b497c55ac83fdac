"""What share each teacher had, by task and by student layer, over a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_json, write_text

logger = logging.getLogger(__name__)
ROUTING_FILE = "kv_routing.json"  # in a checkpoint: the sums so far


class RoutingLog:
    """Sums of the teachers' shares, kept on the device; read when something is logged.

    teachers: their names; tasks: names of the tasks, or none; layers: student layers, for shares that differ by layer.
    """

    def __init__(self, teachers: Sequence[str], tasks: Sequence[str], layers: int) -> None:
        self.teachers, self.tasks, self.layers = list(teachers), list(tasks), layers
        self.recent: Tensor | None = None
        self.total: Tensor | None = None

    def add(self, shares: Tensor, tasks: Tensor | None) -> None:
        """shares: [M, B] or [M, L, B]; tasks: [B] long, -1 where unknown."""
        shares = shares.detach().float()
        if shares.dim() == 2:
            shares = shares[:, None].expand(-1, self.layers, -1)
        count = max(1, len(self.tasks))
        of = torch.zeros(shares.shape[2], dtype=torch.long, device=shares.device) if tasks is None else tasks
        of = torch.where(of < 0, count, of)
        sums = shares.new_zeros(*shares.shape[:2], count + 1).index_add_(2, of, shares)  # [M, L, tasks, unknown last]
        self.recent = sums if self.recent is None else self.recent + sums

    def logs(self, reduce: Any) -> dict[str, float]:
        """Mean shares since the last call: `share_<teacher>`, and by task `share_<teacher>/<task>`."""
        if self.recent is None:
            return {}
        sums = reduce(self.recent).cpu()
        self.total = sums if self.total is None else self.total + sums
        self.recent = None
        by_task = sums.sum(1)  # [M, tasks]
        found = {f"share_{t}": float(x) for t, x in zip(self.teachers, by_task.sum(1) / by_task.sum().clamp_min(1e-9))}
        for j, task in enumerate(self.tasks if len(self.tasks) > 1 else []):
            if by_task[:, j].sum() > 0:
                for t, x in zip(self.teachers, by_task[:, j] / by_task[:, j].sum()):
                    found[f"share_{t}/{task}"] = float(x)
        return found

    def so_far(self, reduce: Any) -> Tensor | None:
        """Sums of the run over all ranks, with what is not logged yet; on the CPU, or None without any."""
        if self.recent is None:
            return self.total
        sums = reduce(self.recent).cpu()
        return sums if self.total is None else self.total + sums

    def finish(self, reduce: Any) -> None:
        """At the end of a run: its last steps count, also where nothing is logged of them."""
        self.total, self.recent = self.so_far(reduce), None

    def write_state(self, folder: Path, sums: Tensor | None) -> None:
        """What `so_far` gave, into a checkpoint; nothing where there is one teacher, and so nothing to route."""
        if len(self.teachers) > 1:
            found = {**self._names(), "sums": None if sums is None else sums.tolist()}
            write_text(folder / ROUTING_FILE, json.dumps(found) + "\n")

    def restart(self, folder: Path | None, main: bool = True) -> None:
        """Before a run: from nothing, or with the sums of the checkpoint it goes on from. main: the rank that warns."""
        self.recent = self.total = None
        if folder is None or len(self.teachers) < 2:
            return
        path = folder / ROUTING_FILE
        found = read_json(path) if path.exists() else {}
        same = {name: found.get(name) for name in self._names()} == self._names()
        if same and found["sums"] is not None:
            self.total = torch.tensor(found["sums"], dtype=torch.float32)
        if not same and main:
            why = "is of other tasks" if found else f"has no {ROUTING_FILE}"
            logger.warning("%s %s: routing.json will be of the steps that follow, not of the whole run.", folder, why)

    def _names(self) -> dict[str, Any]:
        return {"teachers": self.teachers, "tasks": self.tasks, "layers": self.layers}

    def matrices(self) -> dict[str, Tensor]:
        """Mean shares over the run: task [tasks, M] and layer [L, M]; without tasks, layer alone."""
        if self.total is None:
            return {}
        by_layer, by_task = self.total.sum(2).T, self.total.sum(1).T[: max(1, len(self.tasks))]
        found = {"layer": by_layer / by_layer.sum(1, keepdim=True).clamp_min(1e-9)}
        if len(self.tasks) > 1:
            found["task"] = by_task / by_task.sum(1, keepdim=True).clamp_min(1e-9)
        return found

    def save(self, folder: Path) -> None:
        """routing.json, and a heat map each: routing_task.png, and routing_layer.png where layers differ."""
        for former in ("routing.json", *(f"routing_{axis}.png" for axis in ("task", "layer"))):
            (folder / former).unlink(missing_ok=True)  # of a run in this folder whose shares differed
        found = self.matrices()
        if not found:
            return
        from .heatmap import draw_heatmap  # matplotlib takes a while to import

        self._write(folder / "routing.json")
        for axis, matrix in found.items():
            names = self.tasks if axis == "task" else [str(i) for i in range(len(matrix))]
            if axis == "layer" and bool((matrix - matrix[0]).abs().max() < 1e-6):
                continue
            draw_heatmap(
                matrix.tolist(), folder / f"routing_{axis}.png", title=f"Mean share of each teacher, by {axis}",
                rows=names, columns=self.teachers, row_label=axis if axis == "task" else "student layer",
                column_label="teacher",
            )  # fmt: skip

    def _write(self, path: Path) -> None:
        """The matrices as JSON, with the names of their axes."""
        content = {"teachers": self.teachers, "tasks": self.tasks}
        content |= {name: matrix.tolist() for name, matrix in self.matrices().items()}
        write_text(path, json.dumps(content, indent=1) + "\n")
