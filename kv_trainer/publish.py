"""Trainer's pushes to the Hub, of whole snapshots: nothing half written, no path of this machine, no failure unsaid.

Trainer's own arguments decide what is pushed when: push_to_hub, hub_strategy, hub_model_id, hub_revision, hub_token,
hub_private_repo, hub_always_push.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from .cards import CardTrainer
from .files import write_text
from .manifest import seal
from .recipes import dump_recipe
from .staging import (
    MODEL_FILES,
    RESULT_FILES,
    RUN_FILES,
    json_without_paths,
    recipe_without_paths,
    stage,
    stage_checkpoint,
)
from .version import __version__

logger = logging.getLogger(__name__)
STAGING = "_hub"  # in output_dir; Trainer's own pushes leave out what begins with an underscore


class PushError(OSError):
    """The Hub could not be reached or did not take a push; what was to be pushed is still there."""


class HubTrainer(CardTrainer):
    """A CardTrainer that pushes whole snapshots, of what `staging.py` lists and nothing else.

    Each push holds the student, kv_bridge.safetensors, the recipe, the metrics and curve so far and a model card; with
    hub_strategy checkpoint or all_checkpoints a second one holds the state to resume from. While training, pushes run
    in the background, and one that fails is a warning; a failed `push_to_hub` is a PushError.
    """

    push_in_progress: Any
    recipe_text: str | None = None  # as it was before the trainer changed some of its arguments

    @cached_property
    def hub(self) -> HfApi:
        return HfApi(library_name="kv_trainer", library_version=__version__)

    # ---- what Trainer calls

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Trainer's, and the branch hub_revision; removes the snapshots that a killed process left."""
        super().init_hf_repo(token, private)
        if self.is_world_process_zero():
            for left in self._staging.glob("*"):
                if not left.name.startswith(f"{os.getpid()}-"):
                    shutil.rmtree(left, ignore_errors=True)
            self._make_branch(self.args.hub_revision, token if token is not None else self.args.hub_token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and push it with all that is known of the run; arguments and result as Trainer's.

        kwargs: those of create_model_card. Returns a CommitInfo, its Future without `blocking`, or None on other ranks.
        PushError if the Hub does not take it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # on all ranks
        if not self.is_world_process_zero():
            return None
        if revision is not None and revision != self.args.hub_revision:
            self._make_branch(revision, token)
        self.create_model_card(**kwargs)
        self.draw_curve(self._folder)
        self.routing.save(self._folder)
        snapshot = self._snapshot(self._stage_results)
        job = {"commit_message": commit_message, "token": token, "revision": revision or self.args.hub_revision}
        self._finish_current_push()
        if not blocking:
            return self.hub.run_as_future(self._upload, snapshot, job)
        found = self._upload(snapshot, job)
        self._finish_current_push()
        return found

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Snapshots of a checkpoint, uploaded while training goes on."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        by_step = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {at}"
        job = {"commit_message": message, "token": args.hub_token, "revision": args.hub_revision}
        checkpoint = Path(checkpoint_folder)
        jobs: list[tuple[Path, dict[str, Any]]] = []
        try:
            jobs.append((self._snapshot(lambda to: self._stage_student(checkpoint, to)), job))
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
                snapshot = self._snapshot(lambda to: stage_checkpoint(checkpoint, to))
                more = {"path_in_repo": name, "delete_patterns": "*"}  # what an earlier one left there
                jobs.append((snapshot, {**job, "commit_message": f"{message}, checkpoint", **more}))
        except Exception as error:  # a full disk, a picture that cannot be drawn: no reason to lose the run
            logger.warning("%s could not be made ready for the Hub: %s: %s", checkpoint, type(error).__name__, error)
        started: Any = [self.hub.run_as_future(self._upload, *each, quiet=True) for each in jobs]
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(started)
        else:
            self.push_in_progress.jobs.extend(started)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        with suppress(OSError):  # not there, or in use by a push that nobody waits for
            self._staging.rmdir()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Find the best checkpoint of a downloaded run beside the one it is resumed from: its path was not pushed."""
        found = super()._init_training_state(*args, **kwargs)
        resumed = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        best = self.state.best_model_checkpoint
        if resumed and self.state.best_global_step and not (best and Path(best).is_dir()):
            beside = Path(resumed).parent / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(beside) if beside.is_dir() else None
        return found

    # ---- snapshots

    @property
    def _staging(self) -> Path:
        return self._folder / STAGING

    def _snapshot(self, fill: Callable[[Path], None]) -> Path:
        """A new folder that `fill` has put files into; gone if it fails."""
        self._staging.mkdir(parents=True, exist_ok=True)
        snapshot = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._staging))
        try:
            fill(snapshot)
        except BaseException:
            shutil.rmtree(snapshot, ignore_errors=True)
            raise
        return snapshot

    def _stage_results(self, snapshot: Path) -> None:
        """What lies in output_dir after training."""
        stage(self._folder, snapshot, (*MODEL_FILES, *RUN_FILES, *RESULT_FILES))
        self._finish(snapshot)

    def _stage_student(self, checkpoint: Path, snapshot: Path) -> None:
        """The student as a checkpoint has it, with metrics, curve and card so far."""
        stage(checkpoint, snapshot, MODEL_FILES)
        stage(self._folder, snapshot, RUN_FILES)
        self.routing.save(snapshot)
        self._write_card(snapshot, progress=f"step {self.state.global_step} of {self.state.max_steps}")
        self._finish(snapshot)

    def _finish(self, snapshot: Path) -> None:
        """Add the recipe, the curve and, last, the manifest."""
        text = self.recipe_text or dump_recipe(self.recipe)
        write_text(snapshot / "recipe.yaml", recipe_without_paths(text))
        self.draw_curve(snapshot)
        seal(snapshot, json.loads(json_without_paths(json.dumps(self.manifest))))

    def _upload(self, snapshot: Path, job: dict[str, Any], quiet: bool = False) -> CommitInfo:
        """Upload a snapshot and remove it. quiet: a failure is also told, for nobody may ask for the result."""
        try:
            return self.hub.upload_folder(repo_id=str(self.hub_model_id), folder_path=snapshot, **job)
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
            what = f"The push '{job['commit_message']}' to {self.hub_model_id} failed: {why}."
            if quiet:
                logger.warning("%s", what)
            raise PushError(
                f"{what} Everything is still in {self._folder}; push again with trainer.push_to_hub(), or carry out "
                "the recipe with --resume."
            ) from error
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _make_branch(self, revision: str | None, token: str | None) -> None:
        if revision is not None and not revision.startswith("refs/") and revision != "main":
            self.hub.create_branch(str(self.hub_model_id), branch=revision, token=token, exist_ok=True)
