"""Every setting a recipe can hold: one dataclass a section, and the TrainingArguments subclass.

What each default was measured against is in docs/results/defaults/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from .fusion import Confidence, Fusion
from .losses import CrossEntropy, DistillationLoss

# What TrainingArguments calls the switch, the newest name first: 5.23 has another, and keeps the old one as its mirror.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = tuple(name for name in NAMES if name in {f.name for f in fields(TrainingArguments)})


@dataclass
class ModelConfig:
    """A model to load: a hub name, a folder, or `./folder` beside the recipe."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder of a pretrained checkpoint."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the hub repository."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16 or auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    chat: bool | dict[str, Any] = field(
        default=False,
        metadata={"help": "Render rows through the tokenizer's chat template; {name: value} is true, and given to it."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})


@dataclass
class StudentConfig(ModelConfig):
    """The model that learns: pretrained (`model`), pruned (`model` + `keep_layers`) or random (`config`)."""

    config: str | None = field(default=None, metadata={"help": "Folder or name of a config; random weights."})
    keep_layers: list[int] | None = field(default=None, metadata={"help": "Keep just these layers of `model`."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Freeze every parameter whose name contains one of these."}
    )
    peft: dict[str, Any] | None = field(
        default=None, metadata={"help": "Train adapters: {type: lora, r: 16, ...}, fields as in peft's config."}
    )

    def __post_init__(self) -> None:
        if self.peft is None:
            return
        lost = "config" if self.config else "keep_layers" if self.keep_layers is not None else None
        if lost:
            raise ValueError(
                f"{lost} cannot be used beside peft: adapters are saved without their base, which would be lost; "
                "save that base first (load_student(...).save_pretrained) and give its folder as model"
            )
        if self.freeze:
            raise ValueError("freeze would be ignored: peft freezes every weight of the base; leave it out")


@dataclass
class TeacherConfig(ModelConfig):
    """A frozen model whose keys and values the student is taught."""

    weight: float = field(default=1.0, metadata={"help": "Share of this teacher under `fusion: {method: fixed}`."})
    quantization: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Quantise the weights while loading, with bitsandbytes; `dtype` computes."}
    )
    placement: Literal["replicated", "sharded", "offloaded"] = field(
        default="replicated", metadata={"help": "Whole on every rank, dealt out over the ranks, or in host memory."}
    )
    source: Literal["live", "store"] = field(
        default="live", metadata={"help": "store: as kv-trainer precompute wrote it to store.path; no model is loaded."}
    )
    device_map: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "As in from_pretrained: 'auto', 'cuda:1', or {module: device}."}
    )
    random: bool = field(
        default=False, metadata={"help": "control: the same architecture with weights drawn from the seed."}
    )

    def __post_init__(self) -> None:
        for name in ("quantization", "device_map"):
            if self.placement != "replicated" and getattr(self, name):
                raise ValueError(f"{name} cannot be used beside placement: {self.placement}; leave one of them out")
            if self.random and getattr(self, name):
                raise ValueError(f"{name} cannot be used beside random: true; leave one of them out")


@dataclass
class TokenAlignment:
    """How teacher positions are found for student positions (see alignment/tokens.py)."""

    method: Literal["spans"] = "spans"


@dataclass
class TimeAlignment:
    """How positions of texts that differ are found (see alignment/time.py).

    same_text: they are not; only text that both models read is aligned. linear: the whole sequence is resampled.
    truncate: position i to position i, up to the end of the shorter one; what is often done, to compare with.
    segment_aware: prompt, reasoning and answer each for itself, where their texts differ. rkv: the same, but of a
    reasoning that differs, the positions that R-KV selects, layer by layer and head by head.
    """

    method: Literal["same_text", "linear", "truncate", "segment_aware", "rkv"] = "same_text"
    budget: int | None = field(
        default=None, metadata={"help": "rkv: at most this many positions; default as many as the student reasons in."}
    )

    def __post_init__(self) -> None:
        if self.budget is not None and self.method != "rkv":
            raise ValueError(f"budget is {self.budget}, but method {self.method} has no use for it; leave it out")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget is {self.budget}; give at least 1, or null for as many as the student has")


@dataclass
class LayerAlignment:
    """How teacher layers are found for student layers (see alignment/layers.py)."""

    method: Literal["relative_depth", "nearest", "explicit", "cka"] = "relative_depth"
    map: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "explicit: teacher name -> one teacher layer for each student layer."}
    )

    def __post_init__(self) -> None:
        if (self.method == "explicit") != (self.map is not None):
            raise ValueError("method: explicit and map need each other; give both, or neither")


@dataclass
class RopeAlignment:
    """Whether keys are compared before RoPE, or after one that both sides share (see alignment/rope.py)."""

    keys: Literal["before", "after"] = field(
        default="before", metadata={"help": "after: both sides are turned by the student's base, at its positions."}
    )


@dataclass
class AlignmentConfig:
    tokens: TokenAlignment = field(default_factory=TokenAlignment)
    time: TimeAlignment = field(default_factory=TimeAlignment)
    layers: LayerAlignment = field(default_factory=LayerAlignment)
    rope: RopeAlignment = field(default_factory=RopeAlignment)


@dataclass
class ProjectorConfig:
    """The trainable map of heads and head widths that the `kv` loss needs (see alignment/heads.py).

    mlp_ratio, dropout, layer_norm, activation: of the elastic bottleneck alone.
    """

    method: Literal["linear", "elastic_bottleneck", "none"] = "linear"
    direction: Literal["teacher_to_student", "student_to_teacher"] = "student_to_teacher"
    mlp_ratio: float | Literal["auto"] = "auto"
    dropout: float = 0.1
    layer_norm: bool = True
    activation: Literal["silu", "relu", "gelu"] = "silu"
    init: Literal["auto", "grouped", "xavier", "kaiming", "normal"] = "auto"
    learning_rate: float = 1e-3


@dataclass
class DataConfig:
    """Where rows come from and which columns hold the text.

    Rows are `prompt` + `completion`, `prompt` + `reasoning` + `answer`, `messages`, or `text`; any other columns go
    through the templates.
    """

    path: str = field(default="", metadata={"help": "Hub name, folder, or .jsonl / .json / .parquet file."})
    name: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    train_split: str = "train"
    eval_split: str | None = field(default="test", metadata={"help": "Split for evaluation; null for none."})
    prompt: str | None = field(default=None, metadata={"help": "Template such as '{question}'."})
    response: str | None = field(default=None, metadata={"help": "Template such as '{answer}'."})
    task: str | None = field(default=None, metadata={"help": "Template of the task name; default the `task` column."})
    answer: str | None = field(default=None, metadata={"help": "Template of the answer; default the `answer` column."})
    answer_markers: list[str] = field(
        default_factory=lambda: ["</think>", "####"],
        metadata={"help": "The first that a completion holds is where its answer begins, a closing tag before it."},
    )
    teacher_text: dict[str, str] = field(
        default_factory=dict, metadata={"help": "teacher name -> template of a completion of its own: '{solution}'."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens, for student and teachers."})
    truncation_side: Literal["right", "left"] = field(default="right", metadata={"help": "Where longer rows are cut."})
    train_on_prompt: bool = field(default=False, metadata={"help": "Cross-entropy on the prompt too."})
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes that encode rows: of each host's first rank, whose cache the others wait for."},
    )

    def __post_init__(self) -> None:
        for name in ("num_proc", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more, or leave it out.")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a row needs 2 tokens for one to be learned.")


@dataclass
class EvaluationConfig:
    """Exact answers by generation, greedy or sampled, and perplexity, on the evaluation split."""

    generate: bool = field(default=True, metadata={"help": "Generate answers (rows need an answer)."})
    max_new_tokens: int = 256
    batch_size: int = 64
    answer_pattern: str = field(
        default=r"####\s*(.+)",
        metadata={
            "help": "gsm8k ('#### x'), boxed, last_number, auto (the first of these that finds something), "
            "behind </think> where there is one; or a regular expression: group 1 of its last match is the answer."
        },
    )
    do_sample: bool = field(default=False, metadata={"help": "Sampled answers instead of greedy ones."})
    temperature: float = field(default=1.0, metadata={"help": "do_sample: above 0; less is more certain."})
    top_p: float = field(default=1.0, metadata={"help": "do_sample: the likeliest tokens that hold this share."})
    seed: int = field(
        default=0, metadata={"help": "do_sample: decides each row's answer, at any batch size (but for rounding)."}
    )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; give more than 0, or do_sample: false for the best.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a share above 0 and up to 1, which is all tokens.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give 0 or more.")
        for name, default in {"temperature": 1.0, "top_p": 1.0, "seed": 0}.items():
            if not self.do_sample and getattr(self, name) != default:
                raise ValueError(f"{name} is {getattr(self, name)}, which has no effect without do_sample: true.")


@dataclass
class ControlConfig:
    """Controls that break the teacher on purpose, so that a gain can be told from an accident."""

    shuffle: Literal["rows", "rows_of_task", "positions"] | None = field(
        default=None,
        metadata={
            "help": "Every row gets the teacher states of another row (of its task), or position of another one."
        },
    )


@dataclass
class FreezeConfig:
    """Which trainable parameters rest for a part of the run (see callbacks/freezing.py); by default none does.

    What `student.freeze` or PEFT froze is never unfrozen.
    """

    attention: bool = field(default=False, metadata={"help": "The student's attention modules rest at first."})
    until_step: int | None = field(default=None, metadata={"help": "attention: the step at which they begin to move."})
    layer_groups: int | None = field(default=None, metadata={"help": "Unfreeze the layers group by group."})
    unfreeze_every: int | None = field(default=None, metadata={"help": "layer_groups: steps from group to group."})
    order: Literal["top_down", "bottom_up"] = "top_down"
    projectors_after: int | None = field(default=None, metadata={"help": "From this step on, kv_bridge rests."})

    def __post_init__(self) -> None:
        for name in ("until_step", "layer_groups", "unfreeze_every", "projectors_after"):
            value, least = getattr(self, name), 2 if name == "layer_groups" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give {least} or more, or null.")
        if self.attention != (self.until_step is not None):
            raise ValueError("attention and until_step need each other; give both (attention: true), or neither.")
        if (self.layer_groups is None) != (self.unfreeze_every is None):
            raise ValueError("layer_groups and unfreeze_every need each other; give both, or neither.")
        if self.order != "top_down" and self.layer_groups is None:
            raise ValueError(f"order is {self.order}, which has no effect without layer_groups; leave it out.")


@dataclass
class EarlyStoppingConfig:
    """Stop after `patience` evaluations in a row without a gain of more than `threshold`; by default never."""

    patience: int | None = field(default=None, metadata={"help": "Evaluations without a gain; null for no stopping."})
    threshold: float = field(default=0.0, metadata={"help": "Of training.metric_for_best_model, default eval_loss."})

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; give 1 or more evaluations, or null.")
        if self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}; it must not be negative.")
        if self.threshold and self.patience is None:
            raise ValueError(f"threshold is {self.threshold}, which has no effect without patience; give both.")


@dataclass
class AccumulationConfig:
    """Accumulated micro-batches that grow over the run (see callbacks/accumulation.py); by default they do not."""

    steps: list[int] = field(default_factory=list, metadata={"help": "Micro-batches a step, such as [1, 2, 4]."})
    at: list[float] = field(default_factory=list, metadata={"help": "Share of the run where each begins, from 0."})

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.at):
            raise ValueError(f"steps is {self.steps} and at is {self.at}; give as many of one as of the other.")
        if any(a >= b for a, b in zip(self.steps, self.steps[1:])) or min(self.steps, default=1) < 1:
            raise ValueError(f"steps is {self.steps}; give numbers that grow, from 1 or more.")
        shares = [*self.at, 1.0]
        if any(a >= b for a, b in zip(shares, shares[1:])) or self.at and self.at[0] != 0:
            raise ValueError(f"at is {self.at}; give shares of the run that grow, the first 0, all below 1.")


@dataclass
class MonitorConfig:
    """What is measured while training, beyond the loss terms."""

    loss_scales_every: int = field(
        default=0, metadata={"help": "Log every term's share of the gradient each so many steps; 0 = never."}
    )

    def __post_init__(self) -> None:
        if self.loss_scales_every < 0:
            raise ValueError(f"loss_scales_every is {self.loss_scales_every}; give a number of steps, or 0 for never.")


@dataclass
class StoreConfig:
    """Where `kv-trainer precompute` writes the teachers' keys and values, and how (see store/).

    An aligned store is the smallest, and of one student; a raw one, of all layers of each teacher, serves any student,
    tokenizer and alignment.
    """

    path: str | None = field(default=None, metadata={"help": "Folder of the store."})
    bits: Literal[16, 8, 4] | None = field(
        default=None, metadata={"help": "Of a stored value, 16 is float16; default 8, or as the store has it."}
    )
    form: Literal["aligned", "raw"] | None = field(
        default=None, metadata={"help": "aligned (the default): as the student's layers and positions are; raw: not."}
    )
    rows_per_shard: int = field(default=64, metadata={"help": "Rows in a file; so many are held in memory."})

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {self.rows_per_shard}; give at least 1.")


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
