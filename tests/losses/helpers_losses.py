"""Random inputs that hold everything a loss may ask for, and ways to change them that must not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kv_trainer.alignment.heads import TeacherProjectors
from kv_trainer.losses import LossInputs
from kv_trainer.types import KVShape, KVStates

VOCABULARY = 11
Shape = tuple[int, int]  # heads, head width


def states(generator: torch.Generator, layers: int, samples: int, shape: Shape, mask: Tensor) -> KVStates:
    def draw() -> tuple[Tensor, ...]:
        sizes = (samples, shape[0], mask.shape[1], shape[1])
        return tuple(torch.randn(sizes, generator=generator) for _ in range(layers))

    return KVStates(draw(), draw(), mask, tuple(range(layers)), layers)


def random_mask(generator: torch.Generator, samples: int, length: int) -> Tensor:
    """[B, T] with at least three True positions a sample."""
    mask = torch.rand((samples, length), generator=generator) < 0.6
    for row in mask:
        row[torch.randperm(length, generator=generator)[:3]] = True
    return mask


def kv_shape(layers: int, shape: Shape) -> KVShape:
    return KVShape("random", layers, shape[0], shape[1], 1e4, VOCABULARY, 1000)


def random_inputs(
    seed: int = 0,
    samples: int = 3,
    length: int = 6,
    layers: int = 2,
    student: Shape = (2, 3),
    teachers: Sequence[Shape] = ((3, 4), (1, 5)),
    direction: str = "student_to_teacher",
    init: str = "normal",
) -> LossInputs:
    """Every field filled; student states and logits are leaves with gradient, projectors random and linear."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCABULARY, (samples, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[:, 0], labels[:, -1] = -100, 1
    real = torch.ones((samples, length), dtype=torch.bool)
    named = {f"t{i}": shape for i, shape in enumerate(teachers)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = {
            name: TeacherProjectors(kv_shape(layers, student), kv_shape(layers, shape), direction, init=init)
            for name, shape in named.items()
        }
    if init == "normal":
        for parameter in (p for module in projectors.values() for p in module.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    share = torch.rand((len(named), samples), generator=generator) + 0.1
    inputs = LossInputs(
        labels=labels,
        num_tokens=float((labels[:, 1:] != -100).sum()) + 5,  # other micro-batches of the step have some too
        num_samples=samples + 2.0,
        logits=torch.randn((samples, length, VOCABULARY), generator=generator),
        student=states(generator, layers, samples, student, real),
        teachers={
            name: states(generator, layers, samples, shape, random_mask(generator, samples, length))
            for name, shape in named.items()
        },
        weights=share / share.sum(0),
        projectors=projectors,
    )
    for leaf in leaves(inputs):
        leaf.requires_grad_(True)
    return inputs


def leaves(inputs: LossInputs) -> list[Tensor]:
    """What a loss may send gradient to, besides projectors."""
    return [inputs.logits, *inputs.student.keys, *inputs.student.values]


def gradients(loss: Callable[[LossInputs], Tensor], inputs: LossInputs) -> list[Tensor]:
    """Gradient of `loss` in every leaf, zero where it takes no part."""
    return list(torch.autograd.grad(loss(inputs), leaves(inputs), allow_unused=True, materialize_grads=True))


def map_inputs(inputs: LossInputs, along_samples: Callable[[Tensor], Tensor], **changes: object) -> LossInputs:
    """The same inputs with a function applied to every tensor whose first axis is samples."""
    by_sample = along_samples
    return replace(
        inputs,
        labels=by_sample(inputs.labels),
        logits=by_sample(inputs.logits),
        student=inputs.student.map(by_sample, by_sample(inputs.student.mask)),
        teachers={n: t.map(by_sample, by_sample(t.mask)) for n, t in inputs.teachers.items()},
        weights=by_sample(inputs.weights.T).T,
        **changes,
    )


def pad(inputs: LossInputs, left: int, right: int, content: float) -> LossInputs:
    """The same batch with masked positions around it that hold `content`."""

    def around(x: Tensor, axis: int, value: float) -> Tensor:
        def fill(count: int) -> Tensor:
            return x.new_full((*x.shape[:axis], count, *x.shape[axis + 1 :]), value)

        return torch.cat((fill(left), x, fill(right)), dim=axis)

    def wider(kv: KVStates) -> KVStates:
        return kv.map(lambda x: around(x, 2, content), around(kv.mask, 1, False))

    return replace(
        inputs,
        labels=around(inputs.labels, 1, -100),
        logits=around(inputs.logits, 1, content),
        student=wider(inputs.student),
        teachers={name: wider(teacher) for name, teacher in inputs.teachers.items()},
    )


def scramble_masked(inputs: LossInputs, factor: float) -> LossInputs:
    """The same batch with other teacher states where the teacher's mask is False."""

    def scrambled(kv: KVStates) -> KVStates:
        where = kv.mask[:, None, :, None]
        return kv.map(lambda x: torch.where(where, x, factor * torch.randn_like(x)))

    return replace(inputs, teachers={name: scrambled(kv) for name, kv in inputs.teachers.items()})
