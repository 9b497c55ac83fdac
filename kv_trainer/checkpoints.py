"""Checkpoints: the student plain, the bridge's tensors beside it, and a manifest that makes the folder a whole one."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapters import save_generation_config
from .arguments import MultiTeacherKVConfig
from .bridge import NAME, KVBridge
from .files import folder_beside
from .manifest import MANIFEST_FILE, check_match, last_whole, seal, what_is_missing
from .routing import RoutingLog

logger = logging.getLogger(__name__)
FULL = re.compile("PytorchStreamWriter|file write failed|DataLoader worker")  # torch's RuntimeErrors of a full disk
BRIDGE_FILE = "kv_bridge.safetensors"
# What a save that lacks them takes away: left beside a plain student, adapters would be loaded in its place.
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|adapter_(model\.safetensors|config\.json)"
OURS = re.compile(rf"{re.escape(BRIDGE_FILE)}|chat_template\.jinja")


class CheckpointTrainer(Trainer):
    """A Trainer whose model has a KVBridge, and whose checkpoints are whole or not there.

    Each file appears whole. A checkpoint is sealed by its manifest, after all ranks have written, and before an older
    checkpoint is deleted.
    """

    args: MultiTeacherKVConfig
    model: Any  # a PreTrainedModel, or what wraps one
    bridge: KVBridge
    manifest: dict[str, Any]
    routing: RoutingLog
    _checked: tuple[str, ...] = ()  # the checkpoint that was found to be whole and of this run
    ended = False  # whether a resumed run had nothing left to do
    use_cache: bool | None = None  # as the student's config had it: Trainer switches it off, and would save it so

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST_FILE).unlink(missing_ok=True)  # one that is written over is not whole meanwhile
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not FULL.search(str(error)):
                raise
            raise OSError(f"{folder} could not be written, earlier checkpoints are whole: {error}") from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The one funnel of all saves."""
        if not self.args.should_save:
            return
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        student = {k: v for k, v in state_dict.items() if f"{NAME}." not in k}
        bridge = {k.split(f"{NAME}.", 1)[1]: v for k, v in state_dict.items() if f"{NAME}." in k}
        trained_cache = getattr(self.model.config, "use_cache", None)
        if self.use_cache is not None:
            self.model.config.use_cache = self.use_cache
        target = Path(str(output_dir or self.args.output_dir))
        with folder_beside(target) as folder:
            super()._save(str(folder), state_dict=student)
            # A pickle of what recipe.yaml says, with a token and the name of this machine in it.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if isinstance(self.model, PeftModel):  # PEFT leaves out where answers end
                save_generation_config(self.model, folder)
            if self.bridge.layer_maps:
                save_file({k: v.contiguous().cpu() for k, v in bridge.items()}, folder / BRIDGE_FILE)
            written = {path.name for path in folder.iterdir()}
        replaced = OURS if isinstance(self.model, PeftModel) else re.compile(f"{OURS.pattern}|{WEIGHTS}")
        for old in target.iterdir():  # of a save in another number of files, or of another student
            if replaced.fullmatch(old.name) and old.name not in written:
                old.unlink()
        if trained_cache is not None:
            self.model.config.use_cache = trained_cache

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every rank writes of a checkpoint; trainer_state.json follows."""
        super()._save_rng_state(output_dir)
        shares = self.routing.so_far(self.summed)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.routing.write_state(Path(output_dir), shares)
            seal(Path(output_dir), self.manifest)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self.accelerator.reduce(tensor, "sum")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_bridge(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_bridge(str(self.state.best_model_checkpoint))

    def _load_bridge(self, folder: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not self.bridge.state_dict():
            return  # these load the whole model, bridge and all, from files of their own
        path = Path(folder) / BRIDGE_FILE
        if not path.exists():
            raise ValueError(f"{folder} has no {BRIDGE_FILE}, but this run has projectors: it is of another run.")
        self.bridge.load_state_dict(load_file(path))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        load_result.missing_keys[:] = [k for k in load_result.missing_keys if f"{NAME}." not in k]
        super()._issue_warnings_after_load(load_result)

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, checkpoint: Any, trial: Any):
        """A run that has ended is left as it is: Trainer would take a further step, and only then look."""
        found = super()._init_training_state(max_steps, per_epoch, epochs, checkpoint, trial)
        self.routing.restart(Path(str(checkpoint)) if checkpoint else None, self.is_world_process_zero())
        self.ended = bool(self.state.global_step) and (self._was_stopped() or self.state.global_step >= max_steps)
        if not self.ended:
            return found
        logger.warning("%s is the end of its run: nothing is left to train.", Path(str(checkpoint)).name)
        return epochs, 0

    def _was_stopped(self) -> bool:
        """Whether the run that a checkpoint is of was stopped early, by as much patience as this one has."""
        stops = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        given = self.args.early_stopping
        if given.patience is not None:
            for stop in stops:  # it came back as it was, with its own patience
                stop.early_stopping_patience, stop.early_stopping_threshold = given.patience, given.threshold
        return any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in stops)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not (self.ended and "train_runtime" in logs):  # of no step
            super().log(logs, start_time)

    def find_checkpoint(self, asked: str | bool) -> str:
        """The checkpoint to resume from: the folder `asked` for, or, for True, the newest whole one in output_dir.

        ValueError if there is none, if it is not whole, or if it is of another run.
        """
        if asked in self._checked:
            return str(asked)
        if self.args.save_only_model:
            raise ValueError("training.save_only_model keeps no optimizer, so nothing can be resumed; leave it out.")
        if asked is True:
            output_dir = Path(str(self.args.output_dir))
            folder, passed = last_whole(output_dir)
            for name, why in passed.items() if self.is_world_process_zero() else ():
                logger.warning("%s is passed by: %s.", output_dir / name, why)
            if folder is None:
                raise ValueError(f"{output_dir} has no whole checkpoint to resume from; start without --resume.")
        else:
            folder = Path(str(asked))
            missing = what_is_missing(folder)
            if missing:
                raise ValueError(f"{folder} is no whole checkpoint: {missing}.")
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        check_match(folder, self.manifest, sharded, main=self.is_world_process_zero())
        self._checked = (str(folder),)
        return str(folder)


def zero_stage(accelerator: Accelerator) -> int:
    """The ZeRO stage of a DeepSpeed run, else 0."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)
