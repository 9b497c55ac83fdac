"""Distil several, unlike teachers into one small language model through their keys and values."""

from __future__ import annotations

from .alignment.heads import KVProjector
from .arguments import MultiTeacherKVConfig, StudentConfig, TeacherConfig
from .bridge import KVBridge
from .capture import capture_kv
from .losses import DistillationLoss
from .recipes import load_recipe
from .trainer import MultiTeacherKVTrainer
from .types import KVStates, TeacherSignal
from .version import __version__

__all__ = [
    "DistillationLoss",
    "KVBridge",
    "KVProjector",
    "KVStates",
    "MultiTeacherKVConfig",
    "MultiTeacherKVTrainer",
    "StudentConfig",
    "TeacherConfig",
    "TeacherSignal",
    "__version__",
    "capture_kv",
    "load_recipe",
]
