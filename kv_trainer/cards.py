"""The model card and the curve of a run, written by the trainer that knows it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy

from .arguments import MultiTeacherKVConfig, Recipe
from .callbacks import METRICS_FILE, peak_memory_mb
from .capture import kv_shape
from .checkpoints import CheckpointTrainer
from .facts import RunFacts, base_license, hardware, seconds_trained
from .hub import write_model_card
from .types import KVShape


class CardTrainer(CheckpointTrainer):
    """A CheckpointTrainer that writes a model card from its recipe, its results and what else is known of the run."""

    args: MultiTeacherKVConfig
    model: PreTrainedModel
    recipe: Recipe
    teachers: dict[str, Any]  # Teacher, or StoredTeacher

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write output_dir/README.md; what is given here stands in for what the run says of itself."""
        if dataset is not None or dataset_args is not None:
            raise ValueError("dataset and dataset_args are not used: the card names the recipe's data; leave them out.")
        own = ["kv-distillation", "knowledge-distillation", *listed(getattr(self.model, "model_tags", None))]
        task = listed(tasks)
        given = {
            "language": language, "license": license, "base_model": finetuned_from, "datasets": dataset_tags,
            "pipeline_tag": task[0] if task else None, "tags": list(dict.fromkeys([*own, *listed(tags)])),
        }  # fmt: skip
        front = {key: value for key, value in given.items() if value is not None}
        if self.is_world_process_zero():
            self._write_card(self._folder, model_name, front=front)

    def draw_curve(self, folder: Path) -> Path | None:
        """folder/curve.png, drawn again only if the metrics have grown since."""
        from .curve import draw_curve  # matplotlib takes a while to import

        metrics, target = folder / METRICS_FILE, folder / "curve.png"
        if target.exists() and metrics.exists() and target.stat().st_mtime >= metrics.stat().st_mtime:
            return target
        return draw_curve(metrics, target, title=self._folder.absolute().name)

    def _write_card(
        self,
        folder: Path,
        name: str | None = None,
        progress: str | None = None,
        front: dict[str, Any] | None = None,
    ) -> None:
        args, teachers = self.args, self.manifest["teachers"].items()
        commits = {name: teacher["revision"] for name, teacher in teachers}
        commits["student"] = getattr(self.model.config, "_commit_hash", None)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint/", HubStrategy.ALL_CHECKPOINTS: "checkpoint-<step>/"}
        facts = RunFacts(
            name=name or Path(args.hub_model_id or self._folder.absolute()).name,
            repo=self.hub_model_id,
            revisions={key: commit for key, commit in commits.items() if commit},
            license=self._license,
            hardware=hardware(args),
            seconds=seconds_trained(self._folder),
            progress=progress,
            state_folder=places.get(HubStrategy(args.hub_strategy)) if args.push_to_hub else None,
            front=front or {},
        )
        shapes = {name: teacher.shape for name, teacher in self.teachers.items()}
        with suppress(ValueError):  # without teachers any model can be trained, also one that has no such shape
            shapes = {"student": self.student_shape, **shapes}
        recipe = replace(self.recipe, args=args)
        write_model_card(folder, recipe, self.results, shapes, facts)

    @cached_property
    def _license(self) -> dict[str, Any]:
        student = self.recipe.student
        return base_license(student.model, student.revision, self.args.hub_token)

    @property
    def student_shape(self) -> KVShape:
        """The student's shape, without the bridge that is attached to it."""
        shape = kv_shape(self.model)
        bridge = sum(p.numel() for p in self.bridge.parameters())
        return replace(shape, num_parameters=shape.num_parameters - bridge)

    @property
    def results(self) -> dict[str, float]:
        """The last of every figure that was logged."""
        last = {key: value for log in self.state.log_history for key, value in log.items()}
        return {**last, "peak_memory_mb": peak_memory_mb()}


def listed(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
