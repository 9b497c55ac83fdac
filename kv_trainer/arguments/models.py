"""The sections of models: the student and its teachers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
