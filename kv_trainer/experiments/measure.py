"""What every loss term of a trainer does on real batches of its training rows; nothing is trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..balance import REFERENCE, gradient_norms
from ..bridge import NAME
from ..callbacks import check_finite
from ..capture import capture_kv
from ..collator import tokens_of
from ..losses import GradientShare, LayerwiseLoss, LossInputs, needs_teacher
from ..supervision import Supervision
from ..trainer import MultiTeacherKVTrainer
from .probes import Costs, Pass, collapse, gradient_cosine, shuffling, without_student

COLLAPSE_BATCHES = 4  # whose states are kept for the probe
PAIRS = 16  # of rows that exchange their teachers


@dataclass
class Figure:
    """Mean and standard deviation over micro-batches; the deviation of a single one is 0."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass
class Reading:
    """One raw term in one micro-batch; see Term."""

    value: float
    norm: float
    unweighed: float | None
    kept: int
    seconds: float


@dataclass
class Term:
    """One loss term in full: its weight at its peak, all layers in, attention weighting on.

    follows: the gradient share that the weight follows, where it does; `weight` is then what it is to begin with.
    share: of the total. gradient_share: norm of the weighted term's gradient over the weighted cross-entropy's.
    attention_percent: by how much attention weighting changes the value. shuffled_cosine: between its gradients with
    its own teachers and with those of another row. memory: bytes kept for the backward pass. None: does not apply.
    """

    weight: float
    follows: float | None
    value: Figure
    weighted: Figure
    share: Figure
    gradient_share: Figure | None
    attention_percent: float | None
    shuffled_cosine: float | None
    memory: int
    seconds: float


@dataclass
class Measured:
    """samples, batches: how many were looked at. collapse: see probes.collapse; None without a trainable target."""

    samples: int
    batches: int
    terms: dict[str, Term]
    collapse: float | None


def measure(trainer: MultiTeacherKVTrainer, samples: int) -> Measured:
    """Read `samples` random training rows in micro-batches of per_device_train_batch_size, without dropout."""
    bridge, training = trainer.bridge, trainer.model.training
    moving = any(p.requires_grad for p in bridge.projectors.parameters())
    collapsible = "kv" in bridge.losses and moving and trainer.args.projector.direction == "teacher_to_student"
    readings: list[dict[str, Reading]] = []
    heard: list[dict[str, float | None]] = []
    kept: list[LossInputs] = []
    trainer.model.eval()
    try:
        for batch in real_batches(trainer, samples, trainer.args.per_device_train_batch_size):
            passed = run_student(trainer, batch)
            readings.append(read(trainer, batch, passed))
            if collapsible and len(kept) < COLLAPSE_BATCHES:
                kept.append(without_student(bridge.inputs(passed.given, passed.logits, passed.states)))
        if trainer.taught:
            pairs = min(samples // 2, PAIRS)  # a single row has no other
            heard = [hear(trainer, pair) for pair in real_batches(trainer, 2 * pairs, 2)]
        change = collapse(bridge, kept, trainer.args.projector.learning_rate) if kept else None
    finally:
        trainer.model.train(training)
    used = min(samples, len(trainer.train_dataset))
    return Measured(used, len(readings), summarise(trainer, readings, heard), change)


def real_batches(trainer: MultiTeacherKVTrainer, samples: int, size: int) -> Iterator[dict[str, Any]]:
    rows = trainer.train_dataset
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(trainer.args.seed))[:samples].tolist()
    for start in range(0, len(order), size):
        yield trainer._prepare_inputs(trainer.data_collator([rows[i] for i in order[start : start + size]]))


def supervision(trainer: MultiTeacherKVTrainer, batch: dict[str, Any]) -> Supervision:
    """One micro-batch that counts as a whole step, with every term in full."""
    bridge, labels = trainer.bridge, batch["labels"]
    starts = [loss.attention_starts for loss in bridge.losses.values() if isinstance(loss, LayerwiseLoss)]
    step = max(starts, default=0)
    weighing = "teacher_importance" in bridge.weighing(step)
    return Supervision(
        trainer.panel.signals(batch, weighing) if trainer.taught else {}, labels, batch["attention_mask"],
        (labels[:, 1:] != -100).sum().clamp_min(1), len(labels), progress=1.0, step=step,
        tasks=batch.get("task"), answer_positions=batch.get("answer_position"),
        segments=batch.get("segments"), tokens=tokens_of(batch),
    )  # fmt: skip


def run_student(trainer: MultiTeacherKVTrainer, batch: dict[str, Any]) -> Pass:
    given, wanted = supervision(trainer, batch), trainer.bridge.requires
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if not trainer.taught:
        with trainer.accelerator.autocast():
            return Pass(given, trainer.model(**text, use_cache=False).logits, None)
    queries = bool(wanted & {"student_attention", "student_importance"})
    with capture_kv(trainer.model, queries=queries, hidden="student_hidden" in wanted) as capture:
        with trainer.accelerator.autocast():
            logits = trainer.model(**text, use_cache=False).logits
        return Pass(given, logits, capture.stop(text["attention_mask"]))


def trainable(trainer: MultiTeacherKVTrainer) -> list[nn.Parameter]:
    """The student's, without the projectors'."""
    found = [p for name, p in trainer.model.named_parameters() if p.requires_grad and f"{NAME}." not in name]
    if not found:
        raise ValueError("The student has no trainable parameter, so no gradient can be measured; freeze less of it.")
    return found


def read(trainer: MultiTeacherKVTrainer, batch: dict[str, Any], passed: Pass) -> dict[str, Reading]:
    """Every raw term of one micro-batch. NonFiniteLoss where one is not finite."""
    bridge, parameters = trainer.bridge, trainable(trainer)
    inputs = bridge.inputs(passed.given, passed.logits, passed.states)
    costs = Costs(bridge, passed)
    found = {}
    for name, loss in bridge.losses.items():
        term = loss(inputs)
        check_finite({name: term}, 0, batch.get("row", ()), passed.states)
        unweighed = None
        if isinstance(loss, LayerwiseLoss) and loss.attention != "none":
            with torch.no_grad():
                unweighed = float(loss(replace(inputs, step=-1)))  # before any weighting starts
        found[name] = Reading(
            term.item(), float(gradient_norms({name: term}, parameters, lambda x: x)[name]), unweighed,
            *costs.of(loss),
        )  # fmt: skip
    return found


def hear(trainer: MultiTeacherKVTrainer, pair: dict[str, Any]) -> dict[str, float | None]:
    """Cosine between each taught term's gradients with the rows' own teachers and with those of the other row.

    pair: a batch of two rows. In a larger one the part that depends on the text would average out, and any term would
    seem to be deaf. Both sides hold the positions that both have: rows differ in length too, which is not asked here.
    """
    bridge, parameters = trainer.bridge, trainable(trainer)
    with shuffling(bridge, None):
        passed = run_student(trainer, pair)
        own = bridge.inputs(passed.given, passed.logits, passed.states)
    with shuffling(bridge, "rows"):
        # Asked again: what teachers say may be aligned, and so shuffled, as soon as it is said.
        other = bridge.inputs(supervision(trainer, pair), passed.logits, passed.states)
    masks = {name: teacher.mask & other.teachers[name].mask for name, teacher in own.teachers.items()}
    for inputs in (own, other):
        inputs.teachers = {name: replace(t, mask=masks[name]) for name, t in inputs.teachers.items()}
    taught = {name: loss for name, loss in bridge.losses.items() if needs_teacher(loss.needs)}
    return {name: gradient_cosine(loss, own, other, parameters) for name, loss in taught.items()}


def summarise(
    trainer: MultiTeacherKVTrainer,
    readings: Sequence[dict[str, Reading]],
    heard: Sequence[dict[str, float | None]],
) -> dict[str, Term]:
    """By term, over micro-batches; no share of a gradient where the cross-entropy has none, or no weight."""
    losses = trainer.bridge.losses
    reference = losses[REFERENCE].weight if REFERENCE in losses else 0.0
    assert not isinstance(reference, GradientShare), "check_reference refuses it"
    norms = {name: statistics.fmean(r[name].norm for r in readings) for name in losses}
    text = reference * norms.get(REFERENCE, 0.0)
    weights: dict[str, float] = {}
    for name, loss in losses.items():
        if not isinstance(loss.weight, GradientShare):
            weights[name] = loss.weight
        else:
            weights[name] = loss.weight.gradient_share * text / norms[name] if text and norms[name] else 1.0
    totals = [sum(weights[name] * r[name].value for name in losses) or 1.0 for r in readings]
    texts = [reference * r[REFERENCE].norm if reference else 0.0 for r in readings]
    found = {}
    for name, loss in losses.items():
        own, weight = [r[name] for r in readings], weights[name]
        weighted = [weight * x.value for x in own]
        effects = [100 * (x.value / x.unweighed - 1) for x in own if x.unweighed]
        cosines = [cosine for pair in heard if (cosine := pair.get(name)) is not None]
        found[name] = Term(
            weight=weight,
            follows=loss.weight.gradient_share if isinstance(loss.weight, GradientShare) else None,
            value=Figure.of([x.value for x in own]),
            weighted=Figure.of(weighted),
            share=Figure.of([x / total for x, total in zip(weighted, totals, strict=True)]),
            gradient_share=Figure.of([weight * x.norm / text for x, text in zip(own, texts, strict=True)])
            if all(texts) else None,
            attention_percent=statistics.fmean(effects) if effects else None,
            shuffled_cosine=statistics.fmean(cosines) if cosines else None,
            memory=statistics.median_low([x.kept for x in own]),
            seconds=statistics.median_low([x.seconds for x in own]),
        )  # fmt: skip
    return found
