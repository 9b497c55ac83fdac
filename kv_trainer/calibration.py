"""What is measured once, before training, with frozen teachers on the first training rows.

A resumed run measures the same again: same rows, same teachers, and, for matching layers, the same first student.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from .alignment.layers import explicit
from .alignment.mapping import align
from .alignment.matching import layer_similarity, match_layers
from .bridge import KVBridge
from .capture import capture_kv
from .collator import tokens_of
from .fusion import Similarity, TaskWise
from .fusion.learned import pooled
from .teachers import Teacher, TeacherNeeds
from .types import KVStates

logger = logging.getLogger(__name__)
ROWS = 64  # for projectors' statistics and for matching layers
BATCH = 8
LOST = 1e4  # nats a token: more than any model's, less than a hopeless row's
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class Calibration:
    """collate: rows of the encoded data set -> a batch on the right device. autocast: in which the student runs."""

    bridge: KVBridge
    teachers: Mapping[str, Teacher]
    rows: Dataset
    collate: Collate
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(self, student: nn.Module, match: bool, projectors: bool) -> dict[str, Tensor]:
        """All that this run needs. Returns, by teacher, the similarity [Ls, Lt] of layers that were matched."""
        found = self.match_layers(student) if match else {}
        for name, teacher in self.teachers.items():
            teacher.prepare(self.bridge.layer_maps[name].needed, self.bridge.teacher_needs())
        if projectors:
            self.standardise_projectors()
        fusion = self.bridge.fusion
        if isinstance(fusion, TaskWise) and len(self.teachers) > 1:
            self.bridge.task_nll = self.task_likelihoods(fusion.samples)
        if isinstance(fusion, Similarity) and len(self.teachers) > 1:
            self.bridge.prototypes = self.make_prototypes(fusion)
        for name, teacher in self.teachers.items():
            teacher.prepare(self.bridge.layer_maps[name].needed, self.bridge.teacher_needs())
        return found

    def batches(self, chosen: Sequence[int]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(chosen), BATCH):
            yield self.collate([self.rows[i] for i in chosen[start : start + BATCH]])

    def first(self, count: int) -> range:
        return range(min(count, len(self.rows)))

    def standardise_projectors(self) -> None:
        """Every projector's mean and deviation, from the aligned states of its teacher."""
        for name, teacher in self.teachers.items():
            states = []
            for batch in self.batches(self.first(ROWS)):
                signal = teacher.signal(batch["teachers"][name], scores=False, weighing=False)
                states.append(self.bridge.align(name, signal, batch["attention_mask"], tasks=batch.get("task")).kv)
            self.bridge.projectors[name].calibrate(states)

    def score(self, chosen: Sequence[int]) -> Tensor:
        """[M, rows] nats of the supervised text a *student* token."""
        for name, teacher in self.teachers.items():
            teacher.prepare(self.bridge.layer_maps[name].needed, TeacherNeeds(scores=True))
        found = []
        for batch in self.batches(chosen):
            said: list[Any] = [t.signal(batch["teachers"][n]) for n, t in self.teachers.items()]
            nll = torch.stack([signal.nll for signal in said])
            found.append(nll / tokens_of(batch).clamp_min(1))
        scores = torch.cat(found, dim=1)
        for name, each in zip(self.teachers, scores, strict=True):
            if each.isnan().any():
                raise ValueError(
                    f"Teacher '{name}' gives {int(each.isnan().sum())} of {len(each)} calibration rows a likelihood "
                    "that is not a number; load it in bfloat16 or float32, and look whether its checkpoint is whole."
                )
        return scores

    def task_likelihoods(self, samples: int) -> Tensor:
        """[M, tasks]: the mean of the first `samples` rows of each task."""
        if "task" not in self.rows.column_names:
            raise ValueError("fusion.method is task_wise, but the rows have no task; give data.task, or another one.")
        tasks = torch.tensor([-1 if task is None else task for task in self.rows["task"]])
        columns = []
        for task in range(int(tasks.max()) + 1):
            chosen = (tasks == task).nonzero()[:samples, 0].tolist()
            # A task that only rows elsewhere have tells nothing: all teachers alike.
            columns.append(typical(self.score(chosen)) if chosen else torch.zeros(len(self.teachers)))
        return torch.stack([column.to(columns[-1].device) for column in columns], dim=1)

    def make_prototypes(self, fusion: Similarity) -> list[Tensor]:
        """One [1 + K, C] a teacher; see Similarity.make_prototypes."""
        chosen = self.first(fusion.samples)
        best = self.score(chosen).argmin(0)
        made = []
        for i, (name, teacher) in enumerate(self.teachers.items()):
            teacher.prepare(self.bridge.layer_maps[name].needed, TeacherNeeds(mass=self.bridge.selects))
            found = []
            for batch in self.batches(chosen):
                kv = align(
                    teacher.signal(batch["teachers"][name]), self.bridge.layer_maps[name], batch["attention_mask"]
                ).kv
                kv = self.bridge.turn(kv, batch["attention_mask"])
                found.append(pooled(kv, kv.mask).transpose(0, 1).flatten(1))
            made.append(fusion.make_prototypes(torch.cat(found), best == i))
        return made

    @torch.no_grad()
    def match_layers(self, student: nn.Module) -> dict[str, Tensor]:
        """Set every teacher's layer map to the monotone one of greatest CKA with the student as it is now."""
        training = student.training
        student.eval()
        batches = list(self.batches(self.first(ROWS)))
        home, here = next(student.parameters()).device, batches[0]["input_ids"].device
        student.to(here)  # ZeRO and FSDP leave it in host memory until they wrap it
        ours: list[KVStates] = []
        for batch in batches:
            with self.autocast(), capture_kv(student) as capture:
                student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                ours.append(capture.stop(batch["attention_mask"]))
        student.to(home)
        student.train(training)
        found = {}
        for name, teacher in self.teachers.items():
            if teacher.shape.aligned:  # matched before it was stored
                continue
            numbers = teacher.shape.layer_numbers
            teacher.prepare(numbers, TeacherNeeds(mass=self.bridge.selects))
            theirs = [
                align(teacher.signal(b["teachers"][name]), explicit(numbers), b["attention_mask"]).kv for b in batches
            ]
            found[name] = layer_similarity(ours, theirs)
            chosen = [numbers[i] for i in match_layers(found[name])]
            self.bridge.layer_maps[name] = explicit(chosen)
            if len(set(chosen)) == 1 < len(chosen):
                logger.warning(
                    "CKA matches all layers of the student with layer %d of teacher %s, as it does for a student of "
                    "random weights; alignment.layers.method: relative_depth is better there.", chosen[0], name,
                )  # fmt: skip
        return found


def typical(found: Tensor) -> Tensor:
    """[M]: the mean of nats [M, rows] over the rows that no teacher has lost to data.max_length.

    Such a row is HOPELESS, which is meant for itself: in a mean it would cost its teacher the whole task.
    """
    whole = (found < LOST).all(0)
    if not whole.all():
        logger.warning(
            "%d of %d calibration rows are cut to nothing for some teacher (data.max_length), and left out.",
            int((~whole).sum()), len(whole),
        )  # fmt: skip
    return found[:, whole].mean(1) if whole.any() else found.mean(1)
