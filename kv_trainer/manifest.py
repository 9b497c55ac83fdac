"""What a run is made of, kept in each of its checkpoints: another run is not resumed, and neither is half a folder.

A manifest names the student, each teacher (model, revision, a hash of its weights and one of its tokenizer), how they
are aligned and fused, and how a step is cut over ranks. It also lists all files with their sizes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapters import peft_section
from .arguments import MultiTeacherKVConfig, ProjectorConfig
from .balance import measured_of
from .files import write_text
from .fusion import method_of
from .losses import LOSSES
from .recipe_values import plain

if TYPE_CHECKING:
    from .data import Reader
    from .teachers import Teacher

logger = logging.getLogger(__name__)
MANIFEST_FILE = "kv_manifest.json"
STATE_FILE = "trainer_state.json"
UNFINISHED = "checkpoint-is-incomplete.txt"  # while enable_jit_checkpoint writes one; gone when it is done
SAMPLES, FEW = 1024, 16
# A checkpoint's optimizer state has these in it: other values would be written down, and not be used.
OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SCHEDULE = (
    "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm",
    "freeze", "accumulation",
)  # fmt: skip
ROWS = (  # decide which rows come next, and how they are computed
    "data_seed", "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip", "neftune_noise_alpha", "bf16",
    "fp16",
)
SHAPES = ("bridge", "resting")  # of the bridge's tensors, which follow from the settings
FREE = ("losses", "data", "seed", "step", "schedule", "training")  # what a resume may change, as long as it is told
ADDED = ("optimizer", "schedule", "training", "order")  # sections that older manifests lack, or a part of them
VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")  # of a model's config


def fingerprint(model: nn.Module) -> str:
    """A hash of the name, shape and up to SAMPLES evenly spaced values of every parameter.

    Of weights that a device_map left on disk or offloaded, name and shape alone.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            found.update(f"{name} {tuple(parameter.shape)}".encode())
            continue
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLES)].cpu()
        values = values.double() if values.is_floating_point() else values.long()
        found.update(f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]


def files_fingerprint(model: str, revision: str | None = None) -> str | None:
    """As `fingerprint`, of the weights as they lie in a folder, or were fetched from the Hub; None where they are not.

    No model is built and little is read, so that a store can ask whose it is.
    """
    cached = try_to_load_from_cache(model, "config.json", revision=revision) if not Path(model).exists() else None
    folder = Path(cached).parent if isinstance(cached, str) else Path(model)
    found: list[str] = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                tensor = tensors.get_tensor(name)  # mapped, not read
                flat = tensor.reshape(-1)
                values = flat[:: max(1, flat.numel() // FEW)].double().tolist()
                found.append(f"{name} {tuple(tensor.shape)} {values}")
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16] if found else None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:  # without what a call leaves behind
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
        text = json.dumps(rules, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_name(model: Any) -> str:
    """The hub name, or the last part of a folder: a path of this machine is nobody's business."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() else name


def describe_student(student: Any, reader: Reader, peft: Any) -> dict[str, Any]:
    config = student.config.to_dict() if hasattr(student, "config") else {}
    shape = json.dumps({k: v for k, v in config.items() if k not in VOLATILE}, sort_keys=True, default=str)
    return {
        "architecture": type(student).__name__, "config": hashlib.sha256(shape.encode()).hexdigest()[:16],
        "trained": sum(p.requires_grad for p in student.parameters()), "tokenizer": tokenizer_hash(reader.tokenizer),
        "chat": reader.chat, "peft": {} if peft is None else peft_section(peft),
    }  # fmt: skip


def describe_run(
    student: Any, reader: Reader, teachers: Mapping[str, Teacher], args: MultiTeacherKVConfig, peft: Any = None
) -> dict[str, Any]:
    """The manifest of a run, before it begins: plain values only. peft: the config of adapters to come."""
    data = {**asdict(args.data), "path": Path(args.data.path).name}
    del data["num_proc"]  # which changes no row
    return {
        "student": describe_student(student, reader, peft),
        "teachers": {name: teacher.describe() for name, teacher in teachers.items()},
        "alignment": asdict(args.alignment),
        "projector": asdict(args.projector),
        "fusion": {"method": method_of(args.fusion), **asdict(args.fusion)},
        "control": asdict(args.control),
        "data": data,
        "losses": {name: asdict(loss) for name, loss in args.losses.items()},
        # What is learned of teachers, and measured of losses, is kept in their order.
        "order": {"teachers": list(teachers), "losses": list(args.losses) if measured_of(args.losses) else []},
        "optimizer": {name: plain(getattr(args, name)) for name in OPTIMIZER},
        "schedule": {name: plain(getattr(args, name)) for name in SCHEDULE},
        "training": {name: plain(getattr(args, name, None)) for name in ROWS},
        "seed": args.seed,
        "step": {
            "processes": args.world_size, "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
        },
    }  # fmt: skip


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Declare what lies in a checkpoint to be all of it."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files = {name: size for name, size in files.items() if name not in (MANIFEST_FILE, STATE_FILE, UNFINISHED)}
    write_text(folder / MANIFEST_FILE, json.dumps({**manifest, "files": files}, indent=1) + "\n")


def what_is_missing(folder: Path) -> str | None:
    """Why a checkpoint is not whole, in a few words, or None."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        TrainerState.load_from_json(str(folder / STATE_FILE))
    except FileNotFoundError as error:
        return f"it has no {Path(str(error.filename)).name}"
    except (ValueError, KeyError, TypeError):
        return "one of its records was cut off"
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is {'not there' if not path.is_file() else 'cut off'}"
    return None


def last_whole(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest whole checkpoint of a run, and those after it that are not: name -> why."""
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    passed: dict[str, str] = {}
    for folder in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        missing = what_is_missing(folder)
        if missing is None:
            return folder, passed
        passed[folder.name] = missing
    return None, passed


def check_match(folder: Path, manifest: Mapping[str, Any], sharded: bool, main: bool = True) -> None:
    """ValueError, with the difference, if a checkpoint is of another run than `manifest`.

    How a step is cut may change: that is told; sharded states (DeepSpeed, FSDP) are bound to their number of ranks.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {MANIFEST_FILE}: it was not written by kv_trainer, or not to its end.")
    now = json.loads(json.dumps(manifest))  # as JSON has it
    saved = completed(json.loads(path.read_text(encoding="utf-8")))
    saved |= {key: {**now[key], **saved.get(key, {})} for key in ADDED}  # of an older version
    for what, names in now["order"].items():  # of others than these something else is told
        if sorted(saved["order"][what]) != sorted(names):
            saved["order"][what] = names
    for told in (saved, now):  # the hash of its weights says which teacher it is, wherever it came from
        for teacher in told.get("teachers", {}).values():
            teacher.pop("model", None), teacher.pop("revision", None)
    found = {key: differences(saved.get(key), now[key], key) for key in now}
    fixed = [line for key, lines in found.items() if key not in (*FREE, *SHAPES) for line in lines]
    shapes = [line for key in SHAPES for line in found.get(key, [])]
    if shapes and not fixed:  # else they say the same in many words
        added = [line for line in found["losses"] if "not there" in line]
        fixed = added or shapes
    if fixed:
        raise ValueError(f"{folder.name} is of another run: {'; '.join(fixed)}. Restore its settings, or start anew.")
    free = [line for key in FREE for line in found[key]]
    if sharded and any(line.startswith("step.processes") for line in free):
        raise ValueError(f"{folder.name} is sharded over its processes: {'; '.join(found['step'])}. Resume on as many.")
    if free and main:
        logger.warning(
            "%s: %s. Weights, optimizer and step count go on; the rest of the run is not what it would have been.",
            folder.name, "; ".join(free),
        )  # fmt: skip


def completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A manifest of an older version: knobs that it does not know were as their defaults are."""
    told = {name: (LOSSES.get(name), loss) for name, loss in saved.get("losses", {}).items()}
    losses = {name: {**(asdict(kind()) if kind else {}), **loss} for name, (kind, loss) in told.items()}
    projector = {**asdict(ProjectorConfig()), **saved.get("projector", {})}
    return {**saved, "losses": losses, "projector": projector, "resting": saved.get("resting", [])}


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """`path was X, is Y`, for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [*saved, *(k for k in now if k not in saved)]
        return [d for k in keys for d in differences(saved.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if saved == now else [f"{path} was {shown(saved)}, is {shown(now)}"]


def shown(value: Any) -> str:
    return "not there" if value is None else json.dumps(value) if not isinstance(value, dict) else "another"
