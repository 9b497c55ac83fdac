"""A live teacher: a frozen model that says its keys and values, and how sure it is, about a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .capture import KVCapture, StopForward, kv_shape
from .data import IGNORED, Reader
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
