"""What a caller may give MultiTeacherKVTrainer, made into what it works with; and settings it must refuse."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import ModelConfig, MultiTeacherKVConfig, StudentConfig, TeacherConfig
from .data import Reader
from .losses import KVRelationLoss
from .models import load_pretrained, load_student, load_tokenizer
from .teachers import Teacher

logger = logging.getLogger(__name__)
Loadable = str | PreTrainedModel | ModelConfig


def resolve_student(
    model: Loadable, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """The student's model and tokenizer, and whether it reads rows through its chat template."""
    config = StudentConfig(model=model) if isinstance(model, str) else model
    if isinstance(config, StudentConfig):
        return load_student(config), tokenizer or load_tokenizer(config), config.chat
    if tokenizer is None:
        raise ValueError("Give processing_class, the student's tokenizer, beside a model instance.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return config, tokenizer, False


def resolve_teacher(name: str, given: Any, students: PreTrainedTokenizerBase) -> Teacher:
    """A Teacher from whatever the user gave; an instance alone reads with the student's tokenizer."""
    if isinstance(given, Teacher):
        return given
    if isinstance(given, str):
        given = TeacherConfig(model=given)
    if isinstance(given, TeacherConfig):
        return Teacher(load_pretrained(given), Reader(load_tokenizer(given), given.chat), given.weight)
    model, tokenizer = given if isinstance(given, tuple) else (given, students)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Teacher '{name}' is a {type(model).__name__}; give a name, a TeacherConfig or a model.")
    known = model.config.get_text_config().vocab_size
    if known < len(tokenizer):
        raise ValueError(
            f"Teacher '{name}' knows {known} tokens, the tokenizer {len(tokenizer)}: it is not its own. Give the pair "
            "(model, tokenizer)."
        )
    return Teacher(model, Reader(tokenizer))


def numbered_rows(dataset: Dataset | None) -> int:
    """How many row numbers an encoded data set uses. ValueError if two rows share one, as in a concatenation."""
    numbers = list(dataset["row"]) if dataset is not None and "row" in dataset.column_names else []
    if len(set(numbers)) < len(numbers):
        raise ValueError("Two rows of train_dataset have the same number; concatenate rows before they are encoded.")
    return 1 + max(numbers, default=-1)


def check_arguments(args: MultiTeacherKVConfig) -> None:
    """Refuse, or warn about, settings that would be silently inert or wrong."""
    relation = args.losses.get("kv_relation")
    size = args.per_device_train_batch_size
    if args.gradient_accumulation_steps > 1 and isinstance(relation, KVRelationLoss) and size % relation.samples:
        logger.warning(
            "losses.kv_relation.samples is %d, and a micro-batch has %d samples: its last group is smaller, and a step "
            "depends on how it is cut into micro-batches.", relation.samples, size,
        )
    if args.control.shuffle == "rows" and args.per_device_train_batch_size < 2:
        raise ValueError("control.shuffle: rows needs training.per_device_train_batch_size of 2 or more.")
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs: {use_reentrant: true} gives keys and values no gradient; set it to false."
        )
    if args.label_smoothing_factor:
        raise ValueError("training.label_smoothing_factor would be ignored; set losses.cross_entropy.label_smoothing.")
