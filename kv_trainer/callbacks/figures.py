"""The figures that metrics.jsonl holds beside the logs, and the way back from the file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

CROSS_ENTROPY = "loss_cross_entropy"
EPOCH_END = "epoch_end"


def perplexity(cross_entropy: float) -> float:
    """exp of a mean cross-entropy in nats; infinite where that is too large for a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


def group_names(model: torch.nn.Module, optimizer: Any) -> list[str]:
    """A name for each of an optimizer's parameter groups: its own "name", else student or projectors."""
    projectors = {id(p) for name, p in model.named_parameters() if "kv_bridge." in name}

    def name(group: dict[str, Any]) -> str:
        ours = bool(group["params"]) and all(id(p) in projectors for p in group["params"])
        return str(group.get("name") or ("projectors" if ours else "student"))

    return [name(group) for group in optimizer.param_groups]


def group_rates(names: list[str], optimizer: Any) -> dict[str, float]:
    """`learning_rate_student`, `learning_rate_projectors`, ...; one name's further rates are numbered from 2."""
    found: dict[str, list[float]] = {}
    for name, group in zip(names, optimizer.param_groups, strict=True):
        rates = found.setdefault(name, [])
        if group["params"] and float(group["lr"]) not in rates:
            rates.append(float(group["lr"]))
    return {
        f"learning_rate_{name}" + (f"_{i + 1}" if i else ""): rate
        for name, rates in found.items()
        for i, rate in enumerate(rates)
    }


def epoch_means(rows: list[tuple[int, dict[str, Any]]]) -> dict[str, float]:
    """Means over an epoch of the losses and the gradient norm of its logs, each weighted by its steps."""
    names = dict.fromkeys(n for _, row in rows for n in row if n == "grad_norm" or n.split("_")[0] == "loss")
    means: dict[str, float] = {}
    for name in names:
        pairs = [(steps, row[name]) for steps, row in rows if row.get(name) is not None]
        if total := sum(steps for steps, _ in pairs):
            means[f"mean_{name}"] = sum(steps * value for steps, value in pairs) / total
    if f"mean_{CROSS_ENTROPY}" in means:
        means["perplexity"] = perplexity(means[f"mean_{CROSS_ENTROPY}"])
    return means


def since_epoch_end(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The training logs of the epoch that the last line of a file lies in, and the steps of each."""
    found: list[tuple[int, dict[str, Any]]] = []
    last = 0
    for row in rows:
        if row.get("event") == EPOCH_END:
            found, last = [], row["step"]
        elif "loss" in row:
            found.append((row["step"] - last, row))
            last = row["step"]
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. One that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def peak_memory_mb() -> float:
    """The most memory this process has held, in MiB: on its GPU where it has one, else in RAM.

    NaN where the system does not say (Windows without a GPU).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB
