"""What the figures of a diagnosis suggest: in words, and as settings of a recipe that extends the one measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..balance import LIMIT, REFERENCE
from ..files import write_text
from .measure import Measured, Term

TARGET, LOWEST = 0.3, 0.01  # a term pulls this share of the cross-entropy's gradient; below LOWEST it does nothing
CKA_TARGET, CKA_HIGHEST = 0.05, 0.15  # CKA at zero need not preserve geometry: it stays a term beside others
INERT = 0.98  # relations of an untrained student can reach 0.96; a teacher that hears nothing is at 1
COLLAPSED = -0.2


@dataclass(frozen=True)
class Advice:
    """words: one sentence or two. setting, value: what to change in the recipe, such as ("losses", "kv", "weight")."""

    words: str
    setting: tuple[str, ...] = ()
    value: Any = None


def advise(measured: Measured, target_space: bool) -> list[Advice]:
    """target_space: the fusion works on targets, so losses.kv cannot go from student to teacher."""
    terms = {name: term for name, term in measured.terms.items() if name != REFERENCE}
    found = []
    if terms and all(term.gradient_share is None for term in terms.values()):
        found.append(Advice("The cross-entropy does not count or has no gradient: shares of it cannot be measured."))
    for name, term in terms.items():
        if is_inert(term):
            found.append(Advice(
                f"losses.{name} is inert for the student as it is: its gradient hardly depends on which text the "
                f"teacher read (cosine {term.shuffled_cosine:.2f} with that of another row). More weight would not "
                "help: check the alignment and the teacher, and drop the term unless a trained student hears it."
            ))  # fmt: skip
        change = reweigh(name, term)
        if change is not None:
            found.append(change)
    if measured.collapse is not None and measured.collapse < COLLAPSED:
        found.append(collapsing(measured.collapse, target_space))
    return found


def is_inert(term: Term) -> bool:
    return term.shuffled_cosine is not None and term.shuffled_cosine > INERT


def reweigh(name: str, term: Term) -> Advice | None:
    """Another weight for a term that pulls too hard or too little; never for one whose weight follows a share."""
    if term.gradient_share is None or term.follows is not None:
        return None
    share = term.gradient_share.mean
    highest, target = (CKA_HIGHEST, CKA_TARGET) if name == "cka" else (LIMIT, TARGET)
    if LOWEST <= share <= highest:
        return None
    if share == 0:
        return Advice(f"losses.{name} gives the student no gradient: check that positions are aligned, or drop it.")
    if share < LOWEST and is_inert(term):
        return None
    weight = rounded(term.weight * target / share)
    verb = "lower" if share > highest else "raise"
    return Advice(
        f"losses.{name} pulls {percent(share)} as hard as the cross-entropy: {verb} its weight from {term.weight:g} to "
        f"{weight:g}, for about {target:.0%}.",
        ("losses", name, "weight"), weight,
    )  # fmt: skip


def collapsing(change: float, target_space: bool) -> Advice:
    words = (
        f"The target of losses.kv collapses: its projectors, trained alone on the term, change the variance of what "
        f"they map by {change:+.0%}, so it falls without teaching."
    )
    if target_space:
        return Advice(f"{words} The fusion needs this direction for losses.kv: use losses.kv_relation in its place.")
    return Advice(
        f"{words} Set projector.direction to student_to_teacher, where targets are fixed, and diagnose again.",
        ("projector", "direction"), "student_to_teacher",
    )  # fmt: skip


def rounded(weight: float) -> float:
    """Two digits are all that such a measure holds."""
    return float(f"{weight:.2g}")


def percent(share: float) -> str:
    """0.04%, 31%, or 12x from ten times on."""
    if share >= 10:
        return f"{share:,.0f}x"
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def as_patch(advice: Sequence[Advice]) -> dict[str, Any]:
    """The settings of all advice as sections of a recipe; empty where none names one."""
    patch: dict[str, Any] = {}
    for one in advice:
        section = patch
        for key in one.setting[:-1]:
            section = section.setdefault(key, {})
        if one.setting:
            section[one.setting[-1]] = one.value
    return patch


def patched(recipe: dict[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with a patch laid over it, section by section."""
    both = {k: v for k, v in patch.items() if isinstance(v, Mapping) and isinstance(recipe.get(k), dict)}
    return {**recipe, **patch, **{k: patched(recipe[k], v) for k, v in both.items()}}


def refuse_to_overwrite(copy: str | Path) -> None:
    if Path(copy).exists():
        raise ValueError(f"{copy} is there already; give --write the name of a new file.")


def write_copy(copy: str | Path, original: str | Path, patch: Mapping[str, Any], whole: str | None = None) -> None:
    """A recipe that extends the original and holds the patch alone. ValueError if the file is there already.

    whole: the recipe that was measured, where it is not the original: then the copy is that, patched.
    """
    refuse_to_overwrite(copy)
    folder, base = Path(copy).absolute().parent, Path(original).absolute()
    # `extends` does not climb with `..`: from elsewhere only an absolute path leads to the original.
    extends = f"./{base.relative_to(folder).as_posix()}" if base.is_relative_to(folder) else str(base)
    content = {"extends": extends, **patch} if whole is None else patched(yaml.safe_load(whole), patch)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    write_text(copy, f"# kv-trainer train {copy}\n# What kv-trainer diagnose suggests for {original}.\n{text}")
