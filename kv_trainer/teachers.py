"""Live teachers: frozen models that say their keys and values, and how sure they are, about a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .alignment.mapping import AlignedTeacher
from .capture import KVCapture, StopForward, kv_shape
from .data import IGNORED, Reader
from .importance import answer_labels, attention_mass, importance
from .manifest import fingerprint, model_name, tokenizer_hash
from .placement import entry, place, resident
from .profiling import part
from .types import KVShape, KVStates, TeacherSignal
from .vocabulary import Head, output_head, shared_tokens

TEXT = ("input_ids", "attention_mask", "labels", "segments", "supervised")  # all that a teacher reads of a batch
CHUNK = 1024  # positions whose logits are made at a time
HOPELESS = 1e9  # nats of a row that is cut to nothing for a teacher


@dataclass(frozen=True)
class TeacherNeeds:
    """What a run takes from its teachers: what nobody needs is not computed.

    scores: likelihood and entropy of each sample, which needs the head. final: the last hidden states.
    queries: with the keys, for attention. importance: of each position. hidden: outputs of the layers.
    mass: attention by layer and head, for the selection of R-KV.
    reduce: name, signal, the student's mask [B, T], answer positions and tasks [B] (or None) -> what is kept of the
    signal before the next teacher runs.
    """

    scores: bool = False
    final: bool = False
    queries: bool = False
    importance: bool = False
    hidden: bool = False
    mass: bool = False
    reduce: Callable[[str, TeacherSignal, Tensor, Tensor | None, Tensor | None], AlignedTeacher] | None = None


class Teacher:
    """A frozen model, how it reads rows, where its weights lie, and the layers that are taken from it.

    What it says lies on the student's device, wherever the weights are.
    """

    def __init__(
        self, model: PreTrainedModel, reader: Reader, weight: float = 1.0, placement: str = "replicated",
        random: int | None = None,
    ) -> None:  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.weight = weight
        self.shape: KVShape = kv_shape(model)
        self.needs = TeacherNeeds()
        self.head: Head | None = None
        self.placement, self.random = placement, random
        self.device: torch.device | None = None
        self._present = False
        self._capture: KVCapture | None = None
        self._compiled: Callable[..., Any] | None = None

    def describe(self) -> dict[str, Any]:
        """For the manifest of a run, while the weights are whole."""
        return {
            "model": model_name(self.model), "revision": getattr(self.model.config, "_commit_hash", None),
            "weights": fingerprint(self.model), "tokenizer": tokenizer_hash(self.reader.tokenizer),
            "weight": self.weight, **({} if self.random is None else {"random": self.random}),
        }  # fmt: skip

    def place(self, name: str, device: torch.device) -> None:
        """Put the weights where `placement` says, for a student on `device`. name: for messages."""
        self.placement, self.device = place(name, self.model, self.placement, device), device

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """Inside the block this module of the model is where it computes; one inside another adds nothing."""
        if self.placement != "offloaded" or self.device is None or self._present:
            yield
            return
        self._present = True
        try:
            with resident(module, self.device):
                yield
        finally:
            self._present = False

    def prepare(self, layers: tuple[int, ...], needs: TeacherNeeds) -> None:
        """layers: those to capture. Without scores and final states the forward stops at the deepest of them."""
        if self._capture is not None:
            self._capture.close()
        self._capture = KVCapture(self.model, layers, needs.queries or needs.importance or needs.mass, needs.hidden)
        self.needs = needs
        if (needs.scores or needs.final) and self.head is None:
            with self.present(self.model):
                head = output_head(self.model)
            weights = self.model.get_output_embeddings()

            def made_here(hidden: Tensor) -> Tensor:
                with self.present(weights):
                    return head(hidden.to(entry(weights))).to(hidden.device)

            self.head = made_here

    def compile(self, backend: str | None, mode: str | None) -> None:
        """Run the backbone as one graph from now on; it then goes through all layers, also above the deepest wanted."""
        self._compiled = torch.compile(self.model.base_model, backend=backend or "inductor", mode=mode)

    def vocabulary(
        self, students: PreTrainedTokenizerBase, width: int | None = None
    ) -> tuple[Head, Tensor | None, Tensor | None]:
        """The head, and the ids of the tokens shared with the student's tokenizer (None, None: all of them).

        width: rows of the student's head; None: as many as this one's.
        """
        own = self.model.config.get_text_config().vocab_size
        shared = shared_tokens(students, self.reader.tokenizer, width in (None, own))
        assert self.head is not None, "prepare with final comes first"
        if shared is None:
            return self.head, None, None
        # A special token of a tokenizer may have no row in the head (see model_checks.tokens_of_text).
        known = [(a, b) for a, b in zip(*shared) if b < own and (width is None or a < width)]
        if not known:
            raise ValueError(
                f"The vocabularies of the student and {self.reader.tokenizer.name_or_path} share no token, so logits "
                "cannot be compared; leave out losses.logit_kd."
            )
        ours, theirs = (torch.tensor(ids, device=self.device or self.model.device) for ids in zip(*known))
        return self.head, ours, theirs

    def signal(
        self, batch: Mapping[str, Tensor], rows: Tensor | None = None, scores: bool = True, weighing: bool = True
    ) -> TeacherSignal:
        """What the teacher says about a batch, or about some `rows` [b] of it.

        batch: input_ids, attention_mask, labels [B, S] of this teacher's tokens; index [B, T]; supervised [B].
        Samples that are the same text are read once, where the batch says which these are (`distinct`, `again`).
        scores: also likelihood and entropy, if this run needs them; weighing: also the importance of positions.
        """
        again = batch.get("again") if rows is None and not self.needs.queries and self._compiled is None else None
        text = {k: batch[k] for k in TEXT if k in batch}
        if again is not None:
            text = {k: v[batch["distinct"]] for k, v in text.items()}
        if rows is not None:
            longest = int(text["attention_mask"][rows].any(0).nonzero().max()) + 1
            text = {k: v[rows, :longest] if v.dim() > 1 else v[rows] for k, v in text.items()}
        scores = scores and self.needs.scores
        kv, last = self._run(text, whole=scores or self.needs.final)
        nll = entropy = None
        if scores:
            assert last is not None and rows is None, "scores are of whole batches"
            with part("teachers' scores"):
                nll, entropy = self._scores(last, text["labels"], text["supervised"])
        weights, answer = None, answer_labels(text["labels"], text.get("segments"))
        if self.needs.importance and weighing:
            with part("teachers' importance"):
                weights = importance(kv, answer)
        # Queries that only weigh positions are not carried on.
        found = TeacherSignal(
            kv if self.needs.queries else replace(kv, queries=None, attention=None), batch["index"], nll, rows, entropy,
            weights,
            last if self.needs.final else None,
            batch.get("answer_position"), batch.get("rank"), text.get("segments"),
            attention_mass(kv, answer, by_head=True) if self.needs.mass else None,
        )  # fmt: skip
        return found if again is None else found.repeated(again)

    @torch.no_grad()
    def _run(self, text: Mapping[str, Tensor], whole: bool) -> tuple[KVStates, Tensor | None]:
        """Captured states and, of a whole forward, the last hidden states [B, S, C]."""
        assert self._capture is not None, "prepare comes first"
        # Layers that are dealt out are gathered by all ranks together: none may stop where another goes on.
        self._capture.stop_early = not whole and self.placement != "sharded" and self._compiled is None
        mask, last = text["attention_mask"], None
        with self.present(self.model):
            start = entry(self.model.get_input_embeddings())
            inputs = {k: text[k].to(start) for k in ("input_ids", "attention_mask")}
            self._capture.start()
            try:
                with suppress(StopForward):
                    backbone = self.model.base_model if self._compiled is None else self._compiled
                    with part("teachers' forward"):
                        last = backbone(**inputs, use_cache=False)[0]
                states = self._capture.stop(mask)
            finally:
                self._capture.forget()
        return states.to(mask.device), None if last is None or not whole else last.to(mask.device)

    @torch.no_grad()
    def _scores(self, last: Tensor, labels: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
        """[B] nats of the supervised tokens, summed, and [B] mean entropy as a share of the largest possible.

        A row that was cut counts as if its lost part were as hard as the rest, one cut to nothing as hopeless in both.
        """
        assert self.head is not None
        counted = labels[:, 1:] != IGNORED
        each, surprise = [], []
        with self.present(self.model.get_output_embeddings()):  # once for all parts
            for hidden, targets in zip(
                last[:, :-1][counted].split(CHUNK), labels[:, 1:][counted].split(CHUNK), strict=True
            ):
                logs = F.log_softmax(self.head(hidden).float(), dim=-1)
                each.append(-logs.gather(1, targets[:, None])[:, 0])
                surprise.append(-(logs.exp() * logs).sum(1) / math.log(logs.shape[1]))
        kept = counted.sum(1)
        nll = spread(each, counted) * supervised / kept.clamp_min(1)
        entropy = spread(surprise, counted) / kept.clamp_min(1)
        return nll.masked_fill(kept == 0, HOPELESS), entropy.masked_fill(kept == 0, HOPELESS)


def spread(parts: list[Tensor], counted: Tensor) -> Tensor:
    """Sums by sample, [B], of values given one a True position of counted [B, S]."""
    values = torch.cat(parts) if parts else counted.new_zeros(0, dtype=torch.float32)
    return torch.zeros(counted.shape, device=counted.device).masked_scatter(counted, values).sum(1)
