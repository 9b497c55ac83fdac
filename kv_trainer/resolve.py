"""What a caller may give MultiTeacherKVTrainer, made into what it works with."""

from __future__ import annotations

import logging
import os
import pickle
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import check_method
from .arguments import CHECKPOINTING, ModelConfig, MultiTeacherKVConfig, StudentConfig, TeacherConfig
from .capture import count_parameters
from .data import Reader
from .losses import DistillationLoss
from .losses.base import NEEDS
from .model_checks import check_length, check_name, check_vocabulary, check_whole
from .models import load_pretrained, load_random, load_student, load_tokenizer
from .recipe_values import suggest
from .store.teacher import open_teacher
from .teachers import Teacher

logger = logging.getLogger(__name__)
Loadable = str | PreTrainedModel | ModelConfig
CHECKPOINTED_FROM = 1e9  # parameters of a student above which activations are recomputed, unless told otherwise


def not_there(section: str, model: Any, error: OSError) -> ValueError:
    return ValueError(
        f"{section} is '{model}', which could not be loaded: there is no such folder from here, or it is no model, "
        f"or not on the Hub. {error}"
    )


@contextmanager
def loading(section: str, model: Any) -> Iterator[None]:
    """Inside the block, a model that is not there is told by name."""
    try:
        yield
    except OSError as error:
        raise not_there(section, model, error) from error


@contextmanager
def naming(section: str, model: Any) -> Iterator[None]:
    """As `loading`, and all else that goes wrong with a model's files or tokenizer says whose they are."""
    try:
        yield
    except OSError as error:
        raise not_there(section, model, error) from error
    except (ValueError, ImportError) as error:  # flash attention that is not installed
        raise ValueError(f"{section} is '{model}': {error}") from error


def kind(x: Any) -> str:
    return type(x).__name__


def check_types(args: Any, teachers: Any, train_rows: Any, eval_rows: Any, data_collator: Any = None) -> None:
    """ValueError for what the trainer cannot take, before anything is loaded."""
    if not isinstance(args, MultiTeacherKVConfig):
        raise ValueError(f"args is a {kind(args)}; give MultiTeacherKVConfig, which has TrainingArguments' fields too.")
    if teachers is not None and not isinstance(teachers, Mapping):
        raise ValueError(f"teachers is a {kind(teachers)}; give a dict from a name to a model.")
    for name in teachers or ():
        check_name(name)
    if not isinstance(args.losses, Mapping):
        raise ValueError(f"losses is a {kind(args.losses)}; give a dict such as {{'kv_relation': KVRelationLoss()}}.")
    for name, loss in args.losses.items():
        if not isinstance(loss, DistillationLoss):
            raise ValueError(f"losses['{name}'] is {loss!r}; give one of kv_trainer.losses, such as KVRelationLoss().")
        check_kept(f"losses['{name}']", loss)
        if unknown := sorted(loss.needs - NEEDS):
            hint, known = suggest(unknown[0], sorted(NEEDS)), ", ".join(sorted(NEEDS))
            raise ValueError(f"losses['{name}'] requires '{unknown[0]}'.{hint} It may be {known}.")
    check_kept("fusion", args.fusion)
    if not isinstance(getattr(args.fusion, "needs", frozenset()), frozenset):  # of no fusion at all others tell
        raise ValueError(f"{kind(args.fusion)}.needs is a {kind(args.fusion.needs)}; give a frozenset of names.")
    if type(data_collator).__module__.split(".")[0] in ("transformers", "trl"):
        raise ValueError(
            f"data_collator is a {kind(data_collator)}, which knows no teachers' texts; leave it out, or give a "
            "function around a trainer's own data_collator."
        )
    given = {"train_dataset": train_rows}
    if isinstance(eval_rows, Mapping):
        given |= {f"eval_dataset['{name}']": rows for name, rows in eval_rows.items()}
    else:
        given["eval_dataset"] = eval_rows
    for name, rows in given.items():
        check_rows(name, rows)


def check_kept(place: str, method: Any) -> None:
    """ValueError for a loss or a fusion of one's own that Trainer could not write beside a checkpoint."""
    try:
        pickle.dumps(method)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{place} cannot be saved with the settings of the run ({error}); define its class at the top of a module, "
            "and keep in it what can be copied."
        ) from error


def check_rows(name: str, rows: Any) -> None:
    if rows is not None and not isinstance(rows, Dataset | IterableDataset):  # a streamed one has its own error
        raise ValueError(f"{name} is a {kind(rows)}; give a datasets.Dataset, such as Dataset.from_list(rows).")


def resolve_student(
    model: Loadable, tokenizer: PreTrainedTokenizerBase | Reader | None
) -> tuple[PreTrainedModel, Reader]:
    """The student's model, and how it reads rows."""
    config = StudentConfig(model=model) if isinstance(model, str) else model
    if isinstance(config, StudentConfig):
        if isinstance(tokenizer, Reader) and config.chat and config.chat != tokenizer.chat:
            raise ValueError(f"The student's chat is {config.chat}, but its Reader says {tokenizer.chat}; say it once.")
        with naming("student", config.model or config.config):
            read = tokenizer or load_tokenizer(config)
            reader = read if isinstance(read, Reader) else Reader(read, config.chat)
            loaded = load_student(config)
            check_vocabulary("", loaded.config.get_text_config(), reader.tokenizer)
        return loaded, reader
    if isinstance(config, ModelConfig):
        raise ValueError(f"The student is a {type(config).__name__}; give a name, a StudentConfig or a model.")
    if tokenizer is None:
        raise ValueError("Give processing_class, the student's tokenizer, beside a model instance.")
    reader = tokenizer if isinstance(tokenizer, Reader) else Reader(tokenizer)
    check_vocabulary("The student's processing_class: ", config.config.get_text_config(), reader.tokenizer)
    adapters: Any = getattr(config, "active_peft_config", None)
    if adapters is not None:
        check_method(adapters)
    return config, reader


def resolve_teacher(
    name: str, given: Any, students: PreTrainedTokenizerBase, device: torch.device | None = None, seed: int = 0
) -> Teacher:
    """A Teacher from whatever the user gave; an instance alone reads with the tokenizer of where it was loaded from.

    device: where the student trains, for weights that are quantised while they are loaded. seed: of random weights,
    which also depend on the name.
    """
    if isinstance(given, Teacher):
        return given
    if isinstance(given, str):
        given = TeacherConfig(model=given)
    if isinstance(given, TeacherConfig):
        if isinstance(given.device_map, str) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"teachers.{name}.device_map is '{given.device_map}', and each of several processes would load a copy "
                "there; take placement: sharded, which deals one copy out over the processes, or one process."
            )
        placement = "dispatched" if given.device_map else given.placement
        own = zlib.crc32(f"{seed} {name}".encode())  # two of one architecture are two teachers
        with naming(f"teachers.{name}", given.model):
            reader = Reader(load_tokenizer(given), given.chat)
            model = load_random(given, own) if given.random else load_pretrained(given, device)
            check_vocabulary("", model.config.get_text_config(), reader.tokenizer)
        return Teacher(model, reader, given.weight, placement, seed if given.random else None)
    model, read = given if isinstance(given, tuple) else (given, None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Teacher '{name}' is a {type(model).__name__}; give a name, a TeacherConfig or a model.")
    read = read or own_tokenizer(name, model) or students
    reader = read if isinstance(read, Reader) else Reader(read)
    place = f"Teacher '{name}', for which the pair (model, tokenizer) can be given: "
    check_vocabulary(place, model.config.get_text_config(), reader.tokenizer)
    return Teacher(model, reader)


def own_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights of a teacher that is given as an instance; None, and said so, without one."""
    if model.name_or_path:
        with suppress(OSError, ValueError):
            return load_tokenizer(ModelConfig(model=model.name_or_path))
    logger.warning(
        "Teacher '%s' is a model without a tokenizer, so it reads with the student's. If that is not its own, give the "
        "pair (model, tokenizer).", name,
    )  # fmt: skip
    return None


def resolve_teachers(
    given: Mapping[str, Any], args: MultiTeacherKVConfig, reader: Reader, layers: int, matched_by: str | None = None
) -> dict[str, Any]:
    """A Teacher, or a StoredTeacher, of each. layers, matched_by: see open_teacher."""
    weights = {name: getattr(teacher, "weight", 1.0) for name, teacher in given.items()}
    return {
        name: open_teacher(name, teacher, args, reader, layers, weights, matched_by)
        if isinstance(teacher, TeacherConfig) and teacher.source == "store"
        else resolve_teacher(name, teacher, reader.tokenizer, args.device, args.seed)
        for name, teacher in given.items()
    }


def check_together(student: PreTrainedModel, teachers: Mapping[str, Any], length: int) -> None:
    """ValueError if the student is its own teacher, a model is in parts, or rows of `length` tokens are too long."""
    models = {f"teachers.{name}": getattr(teacher, "model", None) for name, teacher in teachers.items()}
    for place, model in {"student": student, **models}.items():
        if place != "student" and model is student:  # to freeze the one would freeze the other
            raise ValueError(f"{place} is the student itself; load it twice, or give a copy.deepcopy of it.")
        if model is not None:
            check_whole(place, model)
            check_length(place, model.config.get_text_config(), length)


def checkpoint_large_student(args: MultiTeacherKVConfig, student: PreTrainedModel) -> None:
    """Switch gradient checkpointing on for a large student, where nobody said whether to."""
    parameters = count_parameters(student)
    if not wants_checkpointing(args, parameters) or not getattr(student, "supports_gradient_checkpointing", False):
        return
    logger.warning(
        "The student has %.1fB parameters, so gradient checkpointing is on; set training.%s: false to keep all "
        "activations.", parameters / 1e9, CHECKPOINTING[0],
    )  # fmt: skip
    for name in CHECKPOINTING:
        setattr(args, name, True)
        given = getattr(args, f"{name}_kwargs")
        setattr(args, f"{name}_kwargs", {"use_reentrant": False, **(given if isinstance(given, dict) else {})})


def wants_checkpointing(args: MultiTeacherKVConfig, parameters: int) -> bool:
    """Whether a student of so many parameters is to be checkpointed though no setting says so."""
    by_fsdp = isinstance(args.fsdp_config, dict) and args.fsdp_config.get("activation_checkpointing")
    said = any(getattr(args, name) is not None for name in CHECKPOINTING)
    return parameters > CHECKPOINTED_FROM and not said and not by_fsdp


def numbered_rows(dataset: Dataset | None) -> int:
    """How many row numbers an encoded data set uses. ValueError if two rows share one, as in a concatenation."""
    numbers = list(dataset["row"]) if dataset is not None and "row" in dataset.column_names else []
    if len(set(numbers)) < len(numbers):
        raise ValueError("Two rows of train_dataset have the same number; concatenate rows before they are encoded.")
    return 1 + max(numbers, default=-1)
