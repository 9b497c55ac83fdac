"""Every setting a recipe can hold: one dataclass a section, and the TrainingArguments subclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from .losses import CrossEntropy, DistillationLoss


@dataclass
class ModelConfig:
    """A model to load: a hub name, a folder, or `./folder` beside the recipe."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder of a pretrained checkpoint."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the hub repository."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16 or auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    chat: bool = field(default=False, metadata={"help": "Render rows through the tokenizer's chat template."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})


@dataclass
class StudentConfig(ModelConfig):
    """The model that learns: pretrained (`model`), pruned (`model` + `keep_layers`) or random (`config`)."""

    config: str | None = field(default=None, metadata={"help": "Folder or name of a config; random weights."})
    keep_layers: list[int] | None = field(default=None, metadata={"help": "Keep just these layers of `model`."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Freeze every parameter whose name contains one of these."}
    )


@dataclass
class TeacherConfig(ModelConfig):
    """A frozen model whose keys and values the student is taught."""

    weight: float = field(default=1.0, metadata={"help": "Share of this teacher under `fusion: {method: fixed}`."})


@dataclass
class TokenAlignment:
    """How teacher positions are found for student positions (see alignment/tokens.py)."""

    method: Literal["spans"] = "spans"


@dataclass
class LayerAlignment:
    """How teacher layers are found for student layers (see alignment/layers.py)."""

    method: Literal["relative_depth", "nearest", "explicit"] = "relative_depth"
    map: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "explicit: teacher name -> one teacher layer for each student layer."}
    )


@dataclass
class AlignmentConfig:
    tokens: TokenAlignment = field(default_factory=TokenAlignment)
    layers: LayerAlignment = field(default_factory=LayerAlignment)


@dataclass
class ProjectorConfig:
    """The trainable map of heads and head widths that the `kv` loss needs (see alignment/heads.py)."""

    method: Literal["linear", "elastic_bottleneck", "none"] = "linear"
    direction: Literal["teacher_to_student", "student_to_teacher"] = "student_to_teacher"
    mlp_ratio: float | Literal["auto"] = "auto"
    dropout: float = 0.1
    init: Literal["auto", "grouped", "xavier", "kaiming", "normal"] = "auto"
    learning_rate: float = 1e-3


@dataclass
class FusionConfig:
    """How several teachers become one target (see fusion.py)."""

    method: Literal["fixed", "confidence"] = "confidence"
    temperature: float = 1.0


@dataclass
class DataConfig:
    """Where rows come from and which columns hold the text.

    Rows are `prompt` + `completion`, `messages`, or `text`; any other columns go through the templates.
    """

    path: str = field(default="", metadata={"help": "Hub name, folder, or .jsonl / .json / .parquet file."})
    name: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    train_split: str = "train"
    eval_split: str | None = field(default="test", metadata={"help": "Split for evaluation; null for none."})
    prompt: str | None = field(default=None, metadata={"help": "Template such as '{question}'."})
    response: str | None = field(default=None, metadata={"help": "Template such as '{answer}'."})
    task: str | None = field(default=None, metadata={"help": "Template of the task name; default the `task` column."})
    answer: str | None = field(default=None, metadata={"help": "Template of the answer; default the `answer` column."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens, for student and teachers."})
    train_on_prompt: bool = field(default=False, metadata={"help": "Cross-entropy on the prompt too."})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass
class EvaluationConfig:
    """Exact answers by greedy generation, and perplexity, on the evaluation split."""

    generate: bool = field(default=True, metadata={"help": "Generate answers (rows need an answer)."})
    max_new_tokens: int = 256
    batch_size: int = 64
    answer_pattern: str = field(
        default=r"####\s*(.+)", metadata={"help": "Regular expression; group 1 of its last match is the answer."}
    )


@dataclass
class ControlConfig:
    """Controls that break the teacher on purpose, so that a gain can be told from an accident."""

    shuffle: Literal["rows"] | None = field(
        default=None, metadata={"help": "rows: every student row gets the teacher states of another row."}
    )


@dataclass
class MultiTeacherKVConfig(TrainingArguments):
    """TrainingArguments plus what `MultiTeacherKVTrainer` needs to know; one object, as in TRL."""

    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    losses: dict[str, DistillationLoss] = field(default_factory=lambda: {"cross_entropy": CrossEntropy()})
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    control: ControlConfig = field(default_factory=ControlConfig)


@dataclass
class Recipe:
    """A whole run, as its YAML file says it."""

    student: StudentConfig
    teachers: dict[str, TeacherConfig]
    args: MultiTeacherKVConfig
    path: str = ""
