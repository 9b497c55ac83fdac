"""All teachers of a run, each asked only for the rows in which it is heard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .alignment.mapping import AlignedTeacher
from .collator import tokens_of
from .fusion import Fusion, FusionInputs, teacher_shares
from .teachers import Teacher
from .types import TeacherSignal


class TeacherPanel:
    """All teachers of a run, and what each is known to think of every row of the data set.

    A frozen teacher finds a row as likely in every epoch. Where the fusion depends on such scores alone, the shares of
    a batch whose rows have been seen are known at once, and each teacher runs only on the samples in which it has
    one. The result is the same as if all ran (shares below fusion.MIN_SHARE are zero either way), at a fraction of
    the forwards.
    """

    def __init__(self, teachers: Mapping[str, Teacher], fusion: Fusion, rows: int) -> None:
        self.teachers = teachers
        self.fusion = fusion
        self.task_nll: Tensor | None = None  # [M, tasks], once calibrated
        self._given = torch.tensor([teacher.weight for teacher in teachers.values()])
        self._known = torch.full((2, len(teachers), rows), torch.nan)  # nll, entropy

    def signals(self, batch: Mapping[str, Any], weighing: bool = True) -> dict[str, TeacherSignal | AlignedTeacher]:
        """What all teachers say, each reduced, where it is to be, before the next one runs.

        batch: labels, attention_mask [B, T] of the student, row [B], and `teachers`: name -> that teacher's part.
        """
        parts, row = batch["teachers"], batch.get("row")
        if not self.fusion.remembered or len(self.teachers) == 1:
            return self._whole(batch, weighing)
        scored = bool(self.fusion.needs & {"nll", "entropy"})
        nll = entropy = None
        if scored:
            if row is None:
                return self._whole(batch, weighing)
            self._known = self._known.to(row.device)
            seen = self._known[:, :, row]
            nll, entropy = seen[0], seen[1]
            if nll.isnan().any():
                signals = self._whole(batch, weighing)
                known: list[Any] = list(signals.values())
                self._known[0, :, row] = torch.stack([s.nll for s in known]).float()
                self._known[1, :, row] = torch.stack([s.entropy for s in known]).float()
                return signals
        shares = self.shares(batch, nll, entropy)
        # A teacher that no sample asks for runs on one, so that there is something to map.
        asked = [(s > 0).nonzero()[:, 0] if (s > 0).any() else s.new_zeros(1, dtype=torch.long) for s in shares]
        found = {}
        for i, (name, teacher) in enumerate(self.teachers.items()):
            rows = None if len(asked[i]) == len(shares[i]) else asked[i]
            signal = teacher.signal(parts[name], rows, scores=False, weighing=weighing)
            if nll is not None and entropy is not None:
                signal = signal.scored(nll[i], entropy[i])
            found[name] = self._reduced(name, signal, batch)
        return found

    def _whole(self, batch: Mapping[str, Any], weighing: bool) -> dict[str, TeacherSignal | AlignedTeacher]:
        """Every teacher on every sample."""
        parts = batch["teachers"]
        return {
            name: self._reduced(name, teacher.signal(parts[name], weighing=weighing), batch)
            for name, teacher in self.teachers.items()
        }

    def _reduced(self, name: str, signal: TeacherSignal, batch: Mapping[str, Any]) -> TeacherSignal | AlignedTeacher:
        reduce = self.teachers[name].needs.reduce
        if reduce is None:
            return signal
        return reduce(name, signal, batch["attention_mask"], batch.get("answer_position"), batch.get("task"))

    def shares(self, batch: Mapping[str, Any], nll: Tensor | None, entropy: Tensor | None) -> Tensor:
        """[M, B] of a fusion that is `remembered`."""
        tokens = tokens_of(batch)
        inputs = FusionInputs(
            given=self._given.to(tokens.device), tokens=tokens, nll=nll, entropy=entropy,
            tasks=batch.get("task"), task_nll=self.task_nll,
        )  # fmt: skip
        return teacher_shares(self.fusion, inputs)
