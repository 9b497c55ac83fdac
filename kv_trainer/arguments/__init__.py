"""Every setting a recipe can hold: one dataclass a section, and the TrainingArguments subclass.

What each default was measured against is in docs/results/defaults/README.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from transformers import TrainingArguments

from ..fusion import Confidence, Fusion
from ..losses import CrossEntropy, DistillationLoss
from .data import DataConfig, EvaluationConfig, StoreConfig
from .mapping import AlignmentConfig, LayerAlignment, ProjectorConfig, RopeAlignment, TimeAlignment, TokenAlignment
from .models import ModelConfig, StudentConfig, TeacherConfig
from .training import AccumulationConfig, ControlConfig, EarlyStoppingConfig, FreezeConfig, MonitorConfig

__all__ = [
    "CHECKPOINTING",
    "AccumulationConfig",
    "AlignmentConfig",
    "ControlConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "FreezeConfig",
    "LayerAlignment",
    "ModelConfig",
    "MonitorConfig",
    "MultiTeacherKVConfig",
    "ProjectorConfig",
    "Recipe",
    "RopeAlignment",
    "StoreConfig",
    "StudentConfig",
    "TeacherConfig",
    "TimeAlignment",
    "TokenAlignment",
]

# What TrainingArguments calls the switch, the newest name first: 5.23 has another, and keeps the old one as its mirror.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = tuple(name for name in NAMES if name in {f.name for f in fields(TrainingArguments)})


@dataclass
class MultiTeacherKVConfig(TrainingArguments):
    """TrainingArguments plus what `MultiTeacherKVTrainer` needs to know; one object, as in TRL.

    gradient_checkpointing (activation_checkpointing) is None where nobody says: the trainer decides by the student's
    size.
    """

    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Default: on for students above 1B parameters.", "nargs": "?", "const": True}
    )
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    fusion: Fusion = field(default_factory=Confidence)
    losses: dict[str, DistillationLoss] = field(default_factory=lambda: {"cross_entropy": CrossEntropy()})
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    accumulation: AccumulationConfig = field(default_factory=AccumulationConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        unsaid = all(getattr(self, name) is None for name in CHECKPOINTING)
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("perplexity"):
            self.greater_is_better = False  # TrainingArguments knows this of losses alone
        super().__post_init__()
        for name in CHECKPOINTING if unsaid else ():
            setattr(self, name, None)
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs:g}: nothing would be trained; give more than 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments gives it, which is for trackers; our sections as plain values too."""
        found: dict[str, Any] = super().to_dict()
        found |= {k: asdict(v) for k, v in found.items() if is_dataclass(v) and not isinstance(v, type)}
        return {**found, "losses": {name: asdict(loss) for name, loss in self.losses.items()}}


@dataclass
class Recipe:
    """A whole run, as its YAML file says it."""

    student: StudentConfig
    teachers: dict[str, TeacherConfig]
    args: MultiTeacherKVConfig
    path: str = ""

    @property
    def models(self) -> dict[str, StudentConfig | TeacherConfig]:
        """Every model by its place in the recipe: `student`, `teachers.NAME`."""
        return {"student": self.student, **{f"teachers.{name}": teacher for name, teacher in self.teachers.items()}}

    @property
    def weights(self) -> dict[str, float]:
        """Each teacher's own fusion weight."""
        return {name: teacher.weight for name, teacher in self.teachers.items()}

    @property
    def stored(self) -> list[str]:
        """The teachers that are taken from a store."""
        return [name for name, teacher in self.teachers.items() if teacher.source == "store"]
