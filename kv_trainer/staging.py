"""What of a run goes to the Hub: a snapshot in a folder of its own, with no path of this machine in it.

Files that never change are hard links, so that a snapshot costs neither time nor space; the others are copies. An
upload from it can take its time: the run writes on, and deletes old checkpoints, without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from transformers.trainer import TRAINING_ARGS_NAME

from .manifest import MANIFEST_FILE, STATE_FILE, seal

# What a student is loaded from, by the names that save_pretrained gives; nothing else of a folder is pushed.
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model*.safetensors*", "kv_bridge.safetensors", "tokenizer*", "vocab*", "merges*",
    "added_tokens.json", "special_tokens_map.json", "*.model", "*.spm", "*.tiktoken", "chat_template*",
    "additional_chat_templates/*", "configuration_*.py", "modeling_*.py", "tokenization_*.py",
)  # fmt: skip
# What a run tells of itself.
RUN_FILES = ("metrics.jsonl", "layers_*.json", "layers_*.png")
RESULT_FILES = ("all_results.json", "curve.png", "routing*.json", "routing*.png", "README.md")
# In a checkpoint: a pickle with a token, PEFT's card with a path, and what a kill left.
NEVER = (TRAINING_ARGS_NAME, "README.md", ".saving-*", ".*.tmp")
LINKED = (".safetensors", ".pt", ".pth", ".bin")
WORDS = ("tokenizer.json", "vocab*", "added_tokens.json", "special_tokens_map.json")  # a token may look like a path
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def stage(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Add the files of a folder that match a pattern to a snapshot."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name != TRAINING_ARGS_NAME:
                add_file(file, target / file.relative_to(source))


def stage_checkpoint(source: Path, target: Path) -> None:
    """Add a whole checkpoint, from which a run can be resumed elsewhere; its manifest is that of the snapshot."""
    for file in sorted(source.rglob("*")):
        parts = file.relative_to(source).parts
        if file.is_file() and not any(fnmatch(part, pattern) for part in parts for pattern in NEVER):
            add_file(file, target / file.relative_to(source))
    if (target / MANIFEST_FILE).exists():
        seal(target, json.loads((target / MANIFEST_FILE).read_text(encoding="utf-8")))


def add_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in LINKED:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
    elif source.suffix == ".json" and not any(fnmatch(source.name, word) for word in WORDS):
        text = source.read_text(encoding="utf-8")
        target.write_text(json_without_paths(text, source.name == STATE_FILE), encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def json_without_paths(text: str, state: bool = False) -> str:
    """JSON with every path shortened, and otherwise as it is written. state: it is a trainer_state.json."""
    content = json.loads(text)
    found = {value: shortened(value) for value in strings(content)}
    if state and content.get("best_model_checkpoint"):  # also where output_dir is relative
        found[content["best_model_checkpoint"]] = Path(content["best_model_checkpoint"]).name
    for value, short in found.items():
        for ascii_only in (True, False) if value != short else ():
            text = text.replace(json.dumps(value, ensure_ascii=ascii_only), json.dumps(short))
    return text


def recipe_without_paths(text: str) -> str:
    """A dumped recipe with every path shortened; without any, byte by byte the same."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {walk(key): walk(item) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        return shortened(value) if isinstance(value, str) else value

    return yaml.safe_dump(walk(yaml.safe_load(text)), sort_keys=False, allow_unicode=True, width=120)


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON tree, its keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from strings(item)


def shortened(value: str) -> str:
    """A path that is absolute, leaves its folder or goes by the user's name, by its last component.

    Other text comes back without the home folder.
    """
    home = str(Path.home())
    user = {Path.home().name, os.environ.get("USER"), os.environ.get("LOGNAME")}
    if "{" not in value and "\n" not in value:  # else a template
        value = value.removeprefix("file://")
        posix = PurePosixPath(value)
        away = value.startswith("~/") or posix.parts[:1] == ("..",)
        away = away or (any(part in user for part in posix.parts[:-1]) and Path(value).exists())  # else a hub name
        if away or (posix.is_absolute() and (len(posix.parts) > 2 or (posix.name and Path(value).exists()))):
            return posix.name
        if DRIVE.match(value):
            return PureWindowsPath(value).name
    return value.replace(home + os.sep, "") if len(home) > 1 else value
