"""One run of an experiment: `kv-trainer train`, and a record of what it began with and what it was given.

python -m kv_trainer.experiments.arm RECIPE [--quick] [--section.key value ...]
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments import Recipe
from ..facts import hardware
from ..files import read_json, write_text
from ..losses import CrossEntropy
from ..manifest import differences, last_whole
from ..profiling import clocks
from ..recipes import dump_recipe, load_recipe, saved_recipe, settings_of
from ..run import leave_together, train
from ..store.teacher import StoredTeacher
from ..trainer import MultiTeacherKVTrainer
from .fingerprints import CODE, digest, hash_evaluation, hash_inputs, hash_rows, hash_weights, shared_prompts
from .jobs import RECORD


class Recorder(TrainerCallback):
    """What a run was given, step by step: row numbers, supervised tokens, samples, and seconds since it began.

    Seconds are of optimizer steps alone, without loading, calibration, evaluations and saves: of the wall, and of the
    processor, a thread.
    What was recorded until a checkpoint lies beside it, so that a resumed run goes on.
    """

    def __init__(self) -> None:
        self.rows: list[list[torch.Tensor]] = []
        self.tokens: list[Any] = []
        self.samples: list[Any] = []
        self.clocks: dict[str, list[float]] = {"wall": [], "processor": []}
        self.seconds, self.mark = dict.fromkeys(self.clocks, 0.0), clocks()
        self.begin: dict[str, Any] = {}

    def attach(self, trainer: MultiTeacherKVTrainer) -> None:
        """To a trainer that is about to train."""
        self.begin = {"initial": hash_weights(trainer.model), "train_rows": hash_rows(trainer.train_dataset)}
        if trainer.eval_dataset is not None:
            learned = trainer.args.data.train_on_prompt
            shared = shared_prompts(trainer.train_dataset, trainer.eval_dataset, learned)
            self.begin |= {"eval_rows": hash_evaluation(trainer.eval_dataset), "shared_prompts": shared}
        inner, self.trainer = trainer.get_batch_samples, trainer

        def recorded(*args: Any, **kwargs: Any) -> Any:
            batches, tokens = inner(*args, **kwargs)
            if batches:
                self.rows.append([batch["row"] for batch in batches])
                self.tokens.append(tokens)
                self.samples.append(trainer.samples_in_step)
            return batches, tokens

        trainer.get_batch_samples = recorded  # type: ignore[method-assign]
        trainer.add_callback(self)
        self.mark = clocks()

    @property
    def kept(self) -> Path:
        return Path(str(self.trainer.args.output_dir)) / f"progress-{self.trainer.args.process_index}.json"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any) -> None:
        done = state.global_step
        if done and not self.kept.exists():
            raise ValueError(f"{args.output_dir} has checkpoints without a record of their rows; remove them.")
        if done:
            saved = read_json(self.kept)
            self.rows = [[torch.tensor(rows) for rows in step] for step in saved["rows"][:done]]
            self.tokens, self.samples = saved["tokens"][:done], saved["samples"][:done]
            self.clocks = {name: each[:done] for name, each in saved["clocks"].items()}
            self.seconds = {name: each[-1] for name, each in self.clocks.items()}
        self.mark = clocks()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any) -> None:
        then, self.mark = self.mark, clocks()
        for name, clock in self.clocks.items():
            self.seconds[name] += self.mark[name] - then[name]
            clock.append(round(self.seconds[name], 4))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any) -> None:
        self.mark = clocks()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **k: Any) -> None:
        rows = [[batch.tolist() for batch in step] for step in self.rows]
        counts = {name: [float(n or 0) for n in getattr(self, name)] for name in ("tokens", "samples")}
        write_text(self.kept, json.dumps({"rows": rows, **counts, "clocks": self.clocks}))
        self.mark = clocks()

    def order(self) -> str:
        """A hash of the row numbers in the order in which they were trained on, over all ranks."""
        mine = digest(json.dumps([[batch.tolist() for batch in step] for step in self.rows]).encode())
        if self.trainer.args.world_size == 1:
            return mine
        from accelerate.utils import gather_object

        return digest("".join(gather_object([mine])).encode())

    def record(self, results: dict[str, float]) -> dict[str, Any]:
        args = self.trainer.args
        loss = args.losses.get("cross_entropy", CrossEntropy())
        return {
            "seed": args.seed, "steps": len(self.rows), "max_steps": args.max_steps,
            "tokens": int(sum(float(n or 0) for n in self.tokens)),
            "samples": int(sum(map(float, self.samples))), **self.begin,
            "order": self.order(), "cross_entropy": asdict(loss), "processes": args.world_size,
            "teachers": known_weights(self.trainer), "code": CODE,
            "pass_seconds": pass_seconds(self.trainer),
            "selected": bool(args.load_best_model_at_end or args.early_stopping.patience is not None),
            "threads": os.environ.get("OMP_NUM_THREADS"), "cpu": processor_name(),
            "machine": f"{hardware(args)}, Python {platform.python_version()}, {os.cpu_count()} cores",
            "metrics": {k.removeprefix("eval_"): v for k, v in results.items() if k.startswith("eval_")},
            "clocks": self.clocks,
        }  # fmt: skip


def processor_name() -> str:
    """The model of the processor, as far as the system tells it."""
    with suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        told = {key.strip(): value.strip() for key, _, value in lines}  # of the last core
        if name := told.get("model name"):
            return f"{name}, family {told.get('cpu family')}, model {told.get('model')}"
    return platform.processor()


def pass_seconds(trainer: MultiTeacherKVTrainer) -> dict[str, float]:
    """What filling the store took that teachers are read from, by clock; empty where none is, or nobody timed it."""
    stored = [teacher for teacher in trainer.teachers.values() if isinstance(teacher, StoredTeacher)]
    return stored[0].pass_seconds if stored else {}


def known_weights(trainer: MultiTeacherKVTrainer) -> dict[str, list[str]]:
    """Each teacher's model and a hash of its weights; not of those that are drawn from the run's own seed."""
    told = trainer.manifest["teachers"].items()
    return {name: [about["model"], about["weights"]] for name, about in told if "random" not in about}


def run(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe; a run that was interrupted goes on from its last whole checkpoint. Returns the record."""
    folder, recorder = Path(str(recipe.args.output_dir)), Recorder()
    with recipe.args.main_process_first(local=False):  # else a rank might look while another removes
        resume = goes_on(folder, recipe)
        if not resume and recipe.args.process_index == 0:
            remove_begun(folder)
    results = train(recipe, resume=resume, watch=recorder.attach)
    record = {**recorder.record(results), "inputs": hash_inputs(settings_of(dump_recipe(recipe)))}
    if recorder.trainer.is_world_process_zero():
        write_text(folder / RECORD, json.dumps(record) + "\n")
    return record


def goes_on(folder: Path, recipe: Recipe) -> bool:
    """Whether an interrupted run can go on: it has a whole checkpoint, and the record of the steps until there.

    ValueError if it is of other settings.
    """
    checkpoint, _ = last_whole(folder)
    if checkpoint is None or not (folder / "recipe.yaml").exists():
        return False
    found = differences(settings_of(saved_recipe(folder)), settings_of(dump_recipe(recipe)))
    if found:
        raise ValueError(f"{folder} holds a begun run of other settings: {'; '.join(found)}. Remove it to begin anew.")
    records = list(folder.glob("progress-*.json"))
    steps = int(checkpoint.name.rpartition("-")[2])  # a process may be killed between a checkpoint and its record
    return bool(records) and all(len(read_json(r)["rows"]) >= steps for r in records)


def remove_begun(folder: Path) -> None:
    """What a run left that cannot go on: its checkpoints, which are the experiment's own, and its progress."""
    for path in folder.glob("progress-*.json"):
        path.unlink()
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)


def main(arguments: Sequence[str]) -> int:
    recipe, *overrides = [word for word in arguments if word != "--quick"]
    try:
        run(load_recipe(recipe, overrides, quick="--quick" in arguments))
    except (ValueError, OSError) as error:
        print(f"kv-trainer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    leave_together()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
