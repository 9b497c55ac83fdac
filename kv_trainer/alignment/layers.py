"""The layer axis: which teacher layers stand for a student layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..types import KVStates


@dataclass(frozen=True)
class LayerMap:
    """For each student layer two teacher layers and how far to go from the first to the second (0 to 1).

    Only layers that have keys and values count on either side. Teacher layers go by their number in the model.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    fraction: tuple[float, ...]

    @property
    def needed(self) -> tuple[int, ...]:
        """The teacher layers that must be captured, in order."""
        upper = (u for u, f in zip(self.upper, self.fraction, strict=True) if f)
        return tuple(sorted({*self.lower, *upper}))

    def apply(self, states: KVStates) -> KVStates:
        """Teacher states (at least the needed layers) as one state a student layer.

        Hidden states are mixed as keys are, after the embeddings. Queries are left out: the attention of a mixture of
        layers is no mixture of their attentions.
        """
        position = {layer: i for i, layer in enumerate(states.layers)}

        def mix(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                tensors[position[lo]].lerp(tensors[position[hi]], f) if f else tensors[position[lo]]
                for lo, hi, f in zip(self.lower, self.upper, self.fraction, strict=True)
            )

        layers = tuple(range(len(self.lower)))
        return replace(
            states,
            keys=mix(states.keys),
            values=mix(states.values),
            layers=layers,
            num_layers=len(layers),
            queries=None,
            attention=None,
            hidden=(states.hidden[0], *mix(states.hidden[1:])) if states.hidden else None,
        )


def relative_depth(student_layers: int, teacher_layers: int) -> LayerMap:
    """First to first, last to last, linear interpolation between the two nearest teacher layers.

    Layer choice hardly matters (arXiv 2502.04499). A student of one layer learns from the deepest.
    """
    span = max(1, student_layers - 1)
    depth = [(i if student_layers > 1 else 1) * (teacher_layers - 1) / span for i in range(student_layers)]
    lower = tuple(min(int(u), teacher_layers - 1) for u in depth)
    return LayerMap(
        lower=lower,
        upper=tuple(min(lo + 1, teacher_layers - 1) for lo in lower),
        fraction=tuple(u - lo for u, lo in zip(depth, lower, strict=True)),
    )


def nearest(student_layers: int, teacher_layers: int) -> LayerMap:
    """The one teacher layer nearest in relative depth."""
    exact = relative_depth(student_layers, teacher_layers)
    return explicit([u if f >= 0.5 else lo for lo, u, f in zip(exact.lower, exact.upper, exact.fraction, strict=True)])


def explicit(layers: Sequence[int]) -> LayerMap:
    """Student layer i learns from teacher layer layers[i]."""
    return LayerMap(tuple(layers), tuple(layers), (0.0,) * len(layers))


def layer_map(
    method: str, student_layers: int, teacher_layers: int | Sequence[int], given: Sequence[int] | None = None
) -> LayerMap:
    """The map that the recipe asks for; `given` is its explicit list for this teacher.

    student_layers: how many layers of the student have keys and values. teacher_layers: the numbers of those of the
    teacher (`KVShape.layer_numbers`), or how many it has if all do.
    """
    numbers = tuple(range(teacher_layers)) if isinstance(teacher_layers, int) else tuple(teacher_layers)
    if method != "explicit":
        found = {"relative_depth": relative_depth, "nearest": nearest}[method](student_layers, len(numbers))
        lower, upper = (tuple(numbers[i] for i in side) for side in (found.lower, found.upper))
        return LayerMap(lower, upper, found.fraction)
    if given is None or len(given) != student_layers:
        raise ValueError(
            f"alignment.layers.map gives {given} for a student of {student_layers} layers; "
            "list one teacher layer for each of them."
        )
    wrong = [layer for layer in given if layer not in numbers]
    if wrong:
        every = numbers == tuple(range(len(numbers)))
        has = f"it has layers 0 to {len(numbers) - 1}" if every else f"only {list(numbers)} have keys and values"
        raise ValueError(f"alignment.layers.map names the teacher layers {wrong}, but {has}.")
    return explicit(given)
