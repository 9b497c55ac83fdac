"""Which token of a teacher each token of the student is taught by, in one training row."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from transformers import PreTrainedTokenizerBase

from ...alignment.tokens import span_index
from ...arguments import DataConfig, Recipe
from ...curve import FAINT, INK, PALETTE
from ...data import Reader, load_split
from ...examples import example_of
from ...models import load_tokenizer
from ...text import encode
from .style import new_figure, save

ROWS, MOST = 50, 3  # rows of which the shortest is drawn; teachers that fit into a picture
WIDEST = 125.0  # what fits beside each other, in widths of a letter: longer rows are drawn up to there
BEFORE = 2  # tokens that are drawn of those ahead of the first pair, as a chat template writes many


def draw_alignment(recipe: Recipe, target: Path) -> bool:
    """The student's tokens above, each teacher's below, and a line for every pair. False where there is no teacher."""
    if not recipe.teachers:
        return False
    data = recipe.args.data
    rows = [dict(row) for row in load_split(data, data.train_split, ROWS)]
    row = min(rows, key=lambda row: len(example_of(row, data).completion))
    reader = Reader(load_tokenizer(recipe.student), recipe.student.chat)
    teachers = dict(list(recipe.teachers.items())[:MOST])
    figure = new_figure("tokens that have read the same text", height=0.4 + 1.7 * len(teachers))
    panels = figure.subplots(len(teachers), 1, squeeze=False)[:, 0]
    for axes, (name, teacher) in zip(panels, teachers.items(), strict=True):
        draw_pair(axes, row, reader, Reader(load_tokenizer(teacher), teacher.chat), data, name)
    save(figure, target)
    return True


def draw_pair(axes: Axes, row: dict, student: Reader, teacher: Reader, data: DataConfig, name: str) -> None:
    example = example_of(row, data)
    ours, theirs = (encode(example, reader, data.max_length) for reader in (student, teacher))
    index = span_index(ours.spans, theirs.spans)
    above = place_tokens(
        axes, written(student.tokenizer, ours.input_ids), 1.0, {i for i, at in enumerate(index) if at >= 0}
    )
    below = place_tokens(axes, written(teacher.tokenizer, theirs.input_ids), 0.0, {at for at in index if at >= 0})
    for i, at in enumerate(index):
        if i in above and at in below:
            axes.plot([above[i], below[at]], [0.97, 0.23], color=PALETTE[0], linewidth=0.9, alpha=0.8)
    axes.set_xlim(-0.5, max(*above.values(), *below.values()) + 3)
    axes.set_ylim(-0.1, 1.32)
    axes.set_yticks([1.1, 0.1], ["student", name], parse_math=False)
    axes.set_xticks([])
    axes.tick_params(labelsize=9, colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def place_tokens(axes: Axes, tokens: Sequence[str], height: float, aligned: Container[int]) -> dict[int, float]:
    """A box a token, as wide as its text, from shortly before the first that has a partner; one without is pale.

    Returns the middle of each by its number; of those that do not fit an ellipsis is left.
    """
    middles, left = {}, 0.0
    start = max(0, next((i for i in range(len(tokens)) if i in aligned), 0) - BEFORE)
    if start:
        axes.text(left, height + 0.1, "…", va="center", fontsize=9, color=INK)
        left += 2.5
    for number, token in enumerate(tokens[start:], start):
        width = 0.9 * len(token) + 0.9
        if left + width > WIDEST:
            axes.text(left, height + 0.1, "…", va="center", fontsize=9, color=INK)
            break
        colour = PALETTE[5] if number in aligned else FAINT
        axes.add_patch(Rectangle((left, height), width - 0.25, 0.2, facecolor=colour, alpha=0.45, edgecolor="none"))
        middles[number] = left + (width - 0.25) / 2
        axes.text(
            middles[number], height + 0.1, token, ha="center", va="center", fontsize=7, family="monospace", color=INK,
            parse_math=False,
        )  # fmt: skip
        left += width
    return middles


def written(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token alone, spaces as dots, so that what a token holds can be seen."""
    return [str(tokenizer.decode([i])).replace(" ", "·").replace("\n", "¶") or "·" for i in ids]
