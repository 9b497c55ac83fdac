"""Random inputs that hold everything a loss may ask for, and ways to change them that must not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kv_trainer.alignment.heads import TeacherProjectors
from kv_trainer.losses import LossInputs, TeacherLogits
from kv_trainer.types import KVShape, KVStates

VOCABULARY = 11
Shape = tuple[int, int]  # heads, head width


def states(generator: torch.Generator, layers: int, samples: int, shape: Shape, mask: Tensor) -> KVStates:
    def draw() -> tuple[Tensor, ...]:
        sizes = (samples, shape[0], mask.shape[1], shape[1])
        return tuple(torch.randn(sizes, generator=generator) for _ in range(layers))

    return KVStates(draw(), draw(), mask, tuple(range(layers)), layers)


def random_mask(generator: torch.Generator, samples: int, length: int) -> Tensor:
    """[B, T] with at least five True positions a sample."""
    mask = torch.rand((samples, length), generator=generator) < 0.6
    for row in mask:
        row[torch.randperm(length, generator=generator)[:5]] = True
    return mask


def kv_shape(layers: int, shape: Shape) -> KVShape:
    return KVShape("random", layers, shape[0], shape[1], 1e4, VOCABULARY, 1000)


def random_inputs(
    seed: int = 0,
    samples: int = 3,
    length: int = 8,
    layers: int = 2,
    student: Shape = (2, 3),
    teachers: Sequence[Shape] = ((3, 4), (1, 5)),
    direction: str = "student_to_teacher",
    init: str = "normal",
) -> LossInputs:
    """Every field filled; all that the student says are leaves with gradient, projectors random and linear."""
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
    inputs = add_hidden(add_attention(inputs, generator), generator)
    for leaf in leaves(inputs):
        leaf.requires_grad_(True)
    return inputs


def add_hidden(inputs: LossInputs, generator: torch.Generator) -> LossInputs:
    """Hidden states of every layer with random linear maps, an answer in every sample but the third, and logits.

    The first teacher's hidden states are as wide as the student's and it shares its vocabulary; the second's do not.
    """

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    samples, length = inputs.labels.shape
    layers = inputs.student.num_layers
    inputs.answer_positions = torch.randint(length - 1, (samples,), generator=generator)
    inputs.answer_positions[2:3] = -1
    inputs.student_hidden = tuple(draw(samples, length, 6) for _ in range(layers + 1))
    for i, name in enumerate(inputs.teachers):
        inputs.answered[name] = (inputs.answer_positions >= 0) & (torch.arange(samples) != 1 + i)
        width = 6 if i % 2 == 0 else 5
        inputs.teacher_hidden[name] = tuple(draw(samples, width) for _ in range(layers + 1))
        maps = [nn.Identity() if width == 6 else nn.Linear(6, width) for _ in range(layers + 1)]
        for parameter in (p for module in maps for p in module.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 6**0.5
        inputs.hidden_projectors[name] = nn.ModuleList(maps)
        head, shared = draw(width, VOCABULARY + i % 2 * 3), (None, None)
        if i % 2:
            sizes = (VOCABULARY, head.shape[1])
            shared = tuple(torch.randperm(size, generator=generator)[: VOCABULARY - 4] for size in sizes)
        hidden = draw(samples, length, width)
        inputs.teacher_logits[name] = TeacherLogits(hidden, lambda x, head=head: x @ head.to(x.dtype), *shared)
    return inputs


def add_attention(inputs: LossInputs, generator: torch.Generator) -> LossInputs:
    """Queries and keys after RoPE, two query heads a key head, and the importance of positions."""
    for name, kv in {"student": inputs.student, **inputs.teachers}.items():
        layers = []
        for key in kv.keys:
            samples, heads, length, width = key.shape
            queries = torch.randn((samples, 2 * heads, length, width), generator=generator)
            layers.append((queries, torch.randn(key.shape, generator=generator)))
        inputs.attention[name] = tuple(layers)
    for side in ("student", "teacher"):
        inputs.importance[side] = torch.rand(inputs.labels.shape, generator=generator) + 0.05
    return inputs


def leaves_by_need(inputs: LossInputs) -> dict[str, list[Tensor]]:
    """What a loss may send gradient to, besides projectors, by the need that lets it."""
    return {
        "logits": [inputs.logits],
        "student_kv": [*inputs.student.keys, *inputs.student.values],
        "student_hidden": [*inputs.student_hidden],
        "student_attention": [x for layer in inputs.attention["student"] for x in layer],
    }


def leaves(inputs: LossInputs) -> list[Tensor]:
    """All of them: logits, keys, values, hidden states, queries and keys after RoPE."""
    return [x for tensors in leaves_by_need(inputs).values() for x in tensors]


def teacher_tensors(inputs: LossInputs) -> list[Tensor]:
    """All that the teachers say."""
    return [
        *(x for t in inputs.teachers.values() for x in (*t.keys, *t.values)),
        *(x for tensors in inputs.teacher_hidden.values() for x in tensors),
        *(t.hidden for t in inputs.teacher_logits.values()),
        *(x for name in inputs.teachers for layer in inputs.attention[name] for x in layer),
    ]


def gradients(loss: Callable[[LossInputs], Tensor], inputs: LossInputs) -> list[Tensor]:
    """Gradient of `loss` in every leaf, zero where it takes no part."""
    return list(torch.autograd.grad(loss(inputs), leaves(inputs), allow_unused=True, materialize_grads=True))


Change = Callable[[Tensor, int], Tensor]  # a tensor and its axis of positions


def unchanged(x: Tensor, axis: int) -> Tensor:
    return x


def map_answers(inputs: LossInputs, theirs: Callable[[str, Tensor], Tensor]) -> LossInputs:
    """The same inputs with a function, told the name, on what each teacher holds at the answers."""
    return replace(
        inputs, teacher_hidden={n: tuple(theirs(n, x) for x in h) for n, h in inputs.teacher_hidden.items()}
    )


def map_states(inputs: LossInputs, ours: Change, theirs: Callable[[str], Change]) -> LossInputs:
    """The same inputs with a function on all that the student says, and one for each teacher; masks stay."""

    def heads(layers: tuple[tuple[Tensor, Tensor], ...], change: Change) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple((change(q, 2), change(k, 2)) for q, k in layers)

    return replace(
        inputs,
        logits=ours(inputs.logits, 1),
        student=inputs.student.map(lambda x: ours(x, 2)),
        student_hidden=tuple(ours(x, 1) for x in inputs.student_hidden),
        teachers={n: t.map(lambda x, n=n: theirs(n)(x, 2)) for n, t in inputs.teachers.items()},
        teacher_logits={n: replace(t, hidden=theirs(n)(t.hidden, 1)) for n, t in inputs.teacher_logits.items()},
        attention={n: heads(a, ours if n == "student" else theirs(n)) for n, a in inputs.attention.items()},
    )


def map_masks(inputs: LossInputs, change: Callable[[Tensor], Tensor]) -> LossInputs:
    """The same inputs with a function on the mask of the student and of every teacher."""
    return replace(
        inputs,
        student=replace(inputs.student, mask=change(inputs.student.mask)),
        teachers={n: replace(t, mask=change(t.mask)) for n, t in inputs.teachers.items()},
    )


def map_inputs(inputs: LossInputs, along_samples: Callable[[Tensor], Tensor], **changes: object) -> LossInputs:
    """The same inputs with a function applied to every tensor whose first axis is samples."""
    by_sample = along_samples
    mapped = map_masks(map_states(inputs, lambda x, _: by_sample(x), lambda _: lambda x, _: by_sample(x)), by_sample)
    mapped = map_answers(mapped, lambda _, x: by_sample(x))
    return replace(
        mapped,
        labels=by_sample(inputs.labels),
        weights=by_sample(inputs.weights.movedim(-1, 0)).movedim(0, -1),
        answer_positions=by_sample(inputs.answer_positions),
        answered={name: by_sample(said) for name, said in inputs.answered.items()},
        importance={side: by_sample(mass) for side, mass in inputs.importance.items()},
        **changes,
    )


def pad(inputs: LossInputs, left: int, right: int, content: float) -> LossInputs:
    """The same batch with masked positions around it that hold `content`."""

    def around(x: Tensor, axis: int, value: float = content) -> Tensor:
        def fill(count: int) -> Tensor:
            return x.new_full((*x.shape[:axis], count, *x.shape[axis + 1 :]), value)

        return torch.cat((fill(left), x, fill(right)), dim=axis)

    answers = inputs.answer_positions
    return replace(
        map_masks(map_states(inputs, around, lambda _: around), lambda mask: around(mask, 1, False)),
        labels=around(inputs.labels, 1, -100),
        answer_positions=torch.where(answers >= 0, answers + left, answers),
        importance={side: around(mass, 1, 0.0) for side, mass in inputs.importance.items()},
    )


def scramble_masked(inputs: LossInputs, factor: float) -> LossInputs:
    """The same batch with other teacher states where the teacher's mask is False."""

    def scrambled(name: str) -> Change:
        mask = inputs.teachers[name].mask
        return lambda x, axis: torch.where(
            mask.view(len(mask), *(1,) * (axis - 1), -1, *(1,) * (x.dim() - axis - 1)), x, factor * torch.randn_like(x)
        )

    def scrambled_answers(name: str, x: Tensor) -> Tensor:
        return torch.where(inputs.answered[name][:, None], x, factor * torch.randn_like(x))

    return map_answers(map_states(inputs, unchanged, scrambled), scrambled_answers)


def half(inputs: LossInputs) -> LossInputs:
    """The same batch as a bfloat16 model would give it."""
    whole = map_states(inputs, lambda x, _: x.bfloat16(), lambda _: lambda x, _: x.bfloat16())
    return map_answers(whole, lambda _, x: x.bfloat16())
