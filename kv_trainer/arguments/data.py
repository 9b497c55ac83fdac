"""The rows, how the student is evaluated on them, and what is stored of teachers: `data`, `evaluation`, `store`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


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
