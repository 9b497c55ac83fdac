"""What a model card tells of a run beyond its recipe and its results."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from transformers import TrainingArguments

from .adapters import peft_section
from .arguments import ModelConfig, MultiTeacherKVConfig, Recipe, StudentConfig, TeacherConfig
from .callbacks import METRICS_FILE, read_metrics
from .teachers import Teacher
from .version import __version__


@dataclass
class RunFacts:
    """What is not known stays empty and is left out of the card.

    name: of the model; default the repository's, or output_dir's. repo: owner/name, to load it by.
    revisions: model name as in the tables ('student' or a teacher's) -> commit.
    license: `license`, and where there are, `license_name` and `license_link`, as the base model's card has them.
    hardware: in words. seconds: of training, all sessions together.
    progress: 'step 20 of 100' while it trains. state_folder: where the repository keeps the training state.
    front: fields of the card's metadata that replace ours.
    """

    name: str | None = None
    repo: str | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    license: dict[str, Any] = field(default_factory=dict)
    hardware: str = ""
    seconds: float | None = None
    progress: str | None = None
    state_folder: str | None = None
    front: dict[str, Any] = field(default_factory=dict)


def hardware(args: TrainingArguments) -> str:
    """The devices of a run and the versions it ran on; no name of a machine."""
    kind = args.device.type
    if kind == "cuda":
        device = torch.cuda.get_device_name(args.device)
    else:
        device = f"CPU ({platform.machine()})" if kind == "cpu" else kind.upper()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, kv_trainer {__version__}"
    return f"{args.world_size} x {device}, {versions}"


def seconds_trained(output_dir: Path) -> float | None:
    """Seconds of training by the metrics file, over all sessions of a run that was resumed."""
    path = output_dir / METRICS_FILE
    times = [row["time"] for row in read_metrics(path) if row.get("time")] if path.exists() else []
    return max(times, default=None)


def base_license(model: str | None, revision: str | None, token: str | None = None) -> dict[str, Any]:
    """The license fields of a base model's card, of a folder or the Hub; empty where they cannot be known."""
    if not model:
        return {}
    name = "README.md"
    try:
        local = Path(model).exists()
        path = Path(model) / name if local else Path(hf_hub_download(model, name, revision=revision, token=token))
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except (OSError, ValueError, yaml.YAMLError):  # no card, no network, no metadata, or a header that is no YAML
        return {}
    fields = ("license", "license_name", "license_link")
    return {key: data.get(key) for key in fields if data.get(key)} if data.get("license") else {}


def recipe_of(model: Any, teachers: Mapping[str, Any], args: MultiTeacherKVConfig, peft_config: Any = None) -> Recipe:
    """What a trainer was given, as the recipe that comes closest; a model made in Python has no name in it."""
    student = config_of(StudentConfig, model)
    peft_config = peft_config or getattr(model, "active_peft_config", None)
    if peft_config is not None and isinstance(student, StudentConfig):
        student = copy(student)  # not `replace`, which would check what the trainer does not
        student.peft = peft_section(peft_config)
    return Recipe(student, {name: config_of(TeacherConfig, given) for name, given in teachers.items()}, args)


def config_of(kind: type[ModelConfig], given: Any) -> Any:
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, str):
        return kind(model=given)
    model = given.model if isinstance(given, Teacher) else given[0] if isinstance(given, tuple) else given
    return kind(model=getattr(getattr(model, "config", None), "name_or_path", None) or None)
