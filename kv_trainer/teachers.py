"""Live teachers: frozen models that say their keys and values, and how sure they are, about a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .arguments import FusionConfig
from .capture import KVCapture, StopForward, kv_shape
from .data import IGNORED, Reader
from .fusion import teacher_weights
from .types import KVShape, TeacherSignal


class Teacher:
    """A frozen model, how it reads rows, and the layers that are taken from it.

    layers: teacher layers to capture. likelihood: also the negative log-likelihood of each sample; without it the
    forward stops at the deepest captured layer and no vocabulary is ever touched.
    """

    def __init__(self, model: PreTrainedModel, reader: Reader, weight: float = 1.0) -> None:
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.weight = weight
        self.shape: KVShape = kv_shape(model)
        self.likelihood = False
        self._capture: KVCapture | None = None
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prepare(self, layers: tuple[int, ...], likelihood: bool) -> None:
        if self._capture is not None:
            self._capture.close()
        self._capture = KVCapture(self.model, layers)
        self.likelihood = likelihood
        self._capture.stop_early = not likelihood

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        """batch: input_ids, attention_mask, labels [B, S] of this teacher's tokens; index [B, T]; supervised [B]."""
        assert self._capture is not None, "prepare comes first"
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        self._capture.start()
        nll = None
        if self.likelihood:
            # A row that was cut counts as if its lost part were as hard as the rest, one cut to nothing as hopeless.
            kept = (batch["labels"][:, 1:] != IGNORED).sum(1)
            nll = self._likelihood(inputs, batch["labels"]) * batch["supervised"] / kept.clamp_min(1)
            nll = nll.masked_fill(kept == 0, 1e9)
        else:
            with suppress(StopForward):
                self.model.base_model(**inputs)
        return TeacherSignal(self._capture.stop(batch["attention_mask"]), batch["index"], nll)

    def signal_of(self, batch: Mapping[str, Tensor], rows: Tensor, nll: Tensor) -> TeacherSignal:
        """The signal of some samples of a batch whose likelihoods [B] are known: less text, no vocabulary."""
        longest = int(batch["attention_mask"][rows].any(0).nonzero().max()) + 1
        part = {k: batch[k][rows, :longest] for k in ("input_ids", "attention_mask")}
        assert self._capture is not None, "prepare comes first"
        self._capture.stop_early = True
        try:
            self._capture.start()
            with torch.no_grad(), suppress(StopForward):
                self.model.base_model(**part, use_cache=False)
        finally:
            self._capture.stop_early = not self.likelihood
        return TeacherSignal(self._capture.stop(part["attention_mask"]), batch["index"], nll, rows)

    def _likelihood(self, inputs: dict[str, Tensor | bool], labels: Tensor) -> Tensor:
        """[B] nats of the supervised tokens, summed; logits only where some sample is supervised."""
        counted = labels[:, 1:] != IGNORED
        first = int(counted.any(0).int().argmax())
        if self._slices_logits:
            kept = torch.arange(first, labels.shape[1] - 1, device=labels.device)
            logits = self.model(**inputs, logits_to_keep=kept).logits
        else:
            logits = self.model(**inputs).logits[:, first:-1]
        counted, targets = counted[:, first:], labels[:, 1 + first :]
        each = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
        return torch.zeros(counted.shape, dtype=each.dtype, device=each.device).masked_scatter(counted, each).sum(1)


class TeacherPanel:
    """All teachers of a run, and what each is known to think of every row of the data set.

    A frozen teacher finds a row as likely in every epoch. Once the likelihoods of all samples of a batch are known,
    so are the fusion weights, and each teacher runs only on the samples in which it has a share. The result is the
    same as if all ran (shares below fusion.MIN_SHARE are zero either way), at a fraction of the forwards.
    """

    def __init__(self, teachers: Mapping[str, Teacher], fusion: FusionConfig, rows: int) -> None:
        self.teachers = teachers
        self.fusion = fusion
        self._given = [teacher.weight for teacher in teachers.values()]
        self._known = torch.full((len(teachers), rows), torch.nan)

    def signals(self, batch: Mapping[str, Any]) -> dict[str, TeacherSignal]:
        """batch: labels [B, T] of the student, row [B], and `teachers`: name -> that teacher's part."""
        parts, row = batch["teachers"], batch.get("row")
        if row is None or not any(teacher.likelihood for teacher in self.teachers.values()):
            return {name: teacher.signal(parts[name]) for name, teacher in self.teachers.items()}
        self._known = self._known.to(row.device)
        nll = self._known[:, row]
        if nll.isnan().any():
            signals = {name: teacher.signal(parts[name]) for name, teacher in self.teachers.items()}
            self._known[:, row] = torch.stack([signal.nll for signal in signals.values()]).float()
            return signals
        shares = teacher_weights(self.fusion, self._given, nll, batch["labels"])
        # A teacher that no sample asks for runs on one, so that there is something to map.
        chosen = [(share > 0).nonzero()[:, 0] if (share > 0).any() else row.new_zeros(1) for share in shares]
        return {
            name: teacher.signal_of(parts[name], rows, known)
            for (name, teacher), rows, known in zip(self.teachers.items(), chosen, nll, strict=True)
        }
