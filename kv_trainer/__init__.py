"""Distil several, unlike teachers into one small language model through their keys and values."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = [
    "DistillationLoss",
    "KVBridge",
    "KVProjector",
    "KVStates",
    "MultiTeacherKVConfig",
    "MultiTeacherKVTrainer",
    "Reader",
    "StudentConfig",
    "TeacherConfig",
    "TeacherSignal",
    "__version__",
    "capture_kv",
    "linear_indices",
    "load_recipe",
    "position_weights",
    "time_resample",
]

if TYPE_CHECKING:
    from .alignment.heads import KVProjector
    from .alignment.time import linear_indices, time_resample
    from .arguments import MultiTeacherKVConfig, StudentConfig, TeacherConfig
    from .bridge import KVBridge
    from .capture import capture_kv
    from .importance import position_weights
    from .losses import DistillationLoss
    from .recipes import load_recipe
    from .text import Reader
    from .trainer import MultiTeacherKVTrainer
    from .types import KVStates, TeacherSignal
else:  # a type checker that saw __getattr__ would take every misspelt name for an export
    # Imported at first use: `kv-trainer --help` does not wait for torch.
    HOMES = {
        "DistillationLoss": "losses",
        "KVBridge": "bridge",
        "KVProjector": "alignment.heads",
        "KVStates": "types",
        "MultiTeacherKVConfig": "arguments",
        "MultiTeacherKVTrainer": "trainer",
        "Reader": "text",
        "StudentConfig": "arguments",
        "TeacherConfig": "arguments",
        "TeacherSignal": "types",
        "capture_kv": "capture",
        "linear_indices": "alignment.time",
        "load_recipe": "recipes",
        "position_weights": "importance",
        "time_resample": "alignment.time",
    }

    def __getattr__(name: str) -> Any:
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
