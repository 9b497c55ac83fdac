"""Every method that a recipe can switch on, in one table: `kv-trainer methods` prints it, and the tests run over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fusion import FUSIONS, Fusion
from .losses import LOSSES, DistillationLoss


@dataclass(frozen=True)
class Method:
    """section, name: where it stands in a recipe. what: one line. needs: what is computed for it. source: paper.

    switch: the recipe overrides that switch it on, as on the command line.
    """

    section: str
    name: str
    what: str
    needs: str
    source: str
    switch: tuple[str, ...]


def summary(kind: type) -> str:
    """The first sentence of a docstring."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split()).rstrip(".")


def needs_of(kind: type[DistillationLoss] | type[Fusion]) -> str:
    names = kind.requires if issubclass(kind, DistillationLoss) else kind.needs
    return ", ".join(sorted(name.replace("_", " ") for name in names)) or "-"


def setting(section: str, name: str, what: str, needs: str = "-", source: str = "this package", **more: Any) -> Method:
    """A method that is a value of `section`, such as alignment.time.method."""
    switch = [f"--{section}", name] + [str(x) for key, value in more.items() for x in (f"--{dotted(key)}", value)]
    return Method(section, name, what, needs, source, tuple(switch))


def dotted(key: str) -> str:
    return key.replace("__", ".")


def attention_weighting(loss: str, who: str) -> Method:
    what = f"Positions weigh as the {who}'s answer attends to them"
    switch = (f"--{loss}.weight", "1", f"--{loss}.attention", who, f"--{loss}.attention_warmup_steps", "1")
    return Method(f"{loss}.attention", who, what, f"{who} importance", "VATP, arXiv 2406.12335", switch)


KV, RELATION = "losses.kv", "losses.kv_relation"
METHODS: tuple[Method, ...] = (
    setting("alignment.tokens.method", "spans", "Positions that have read the same bytes", source="GOLD, TRL"),
    setting("alignment.time.method", "same_text", "Only text that both models read is aligned"),
    setting("alignment.time.method", "linear", "The whole sequence is resampled"),
    setting("alignment.time.method", "truncate", "Position i to position i, as far as both go; to compare with"),
    setting("alignment.time.method", "segment_aware", "Prompt, reasoning and answer each resampled for itself"),
    setting(
        "alignment.time.method", "rkv", "Of a reasoning that differs, the positions that R-KV selects",
        "teacher attention", "KaVa, arXiv 2510.02312",
    ),
    setting("alignment.layers.method", "relative_depth", "Interpolated between the two nearest teacher layers",
            source="arXiv 2502.04499"),
    setting("alignment.layers.method", "nearest", "The one teacher layer nearest in depth"),
    setting("alignment.layers.method", "explicit", "A list of teacher layers", alignment__layers__map="{T: [0, 1]}"),
    setting("alignment.layers.method", "cka", "Monotone match of greatest debiased CKA, before training",
            "student kv, teacher kv", "arXiv 1905.00414"),
    setting("alignment.rope.keys", "before", "Keys are compared before RoPE"),
    setting("alignment.rope.keys", "after", "Keys of both sides after RoPE of the student's base and positions"),
    setting("projector.method", "linear", "Head width, then heads, one linear map each", "projectors",
            losses__kv__weight=1),
    setting("projector.method", "elastic_bottleneck", "Head width by a bottleneck, then heads", "projectors",
            losses__kv__weight=1),
    setting("projector", "{method: elastic_bottleneck, layer_norm: false, activation: gelu}",
            "The bottleneck without LayerNorm, or with another activation", "projectors", losses__kv__weight=1),
    setting("projector.direction", "student_to_teacher", "The student is mapped to a fixed, standardised target",
            "projectors", losses__kv__weight=1),
    setting("projector.direction", "teacher_to_student", "Each teacher is mapped to the student; the target learns",
            "projectors", "KaVa, arXiv 2510.02312", losses__kv__weight=1),
    *(Method("losses", n, summary(k), needs_of(k), k.source or "-", (f"--losses.{n}.weight", "0.5"))
      for n, k in LOSSES.items()),
    *(setting("losses.kv.metric", m, f"Distance of the kv loss: {m}", "projectors", losses__kv__weight=1)
      for m in ("mse", "smooth_l1", "l1", "cosine")),
    *(attention_weighting(loss, who) for loss in (KV, RELATION) for who in ("student", "teacher")),
    setting(f"{RELATION}.parts", "keys", "The relation of keys alone"),
    setting(f"{RELATION}.parts", "values", "The relation of values alone"),
    setting(f"{RELATION}.layers", "middle", "Some of the student's layers are compared, here the middle third"),
    setting(f"{RELATION}.max_positions", "8", "Positions are sampled, evenly spaced"),
    setting(f"{RELATION}.annealing_ratio", "0.5", "Layers come in one after the other, shallow to deep"),
    *(setting(f"{RELATION}.schedule", s, f"The weight over the run: {s}") for s in ("constant", "linear", "cosine")),
    setting(f"{RELATION}.warmup_ratio", "0.5", "The weight rises from zero"),
    setting(f"{RELATION}.weight", "{gradient_share: 0.3}", "The weight follows a share of the gradient",
            "one more backward pass a term, now and then"),
    *(setting("fusion.method", n, summary(k), needs_of(k), k.source or "-") for n, k in FUSIONS.items()),
    setting("fusion", "{method: confidence, form: ca_mkd}", "Confidence as CA-MKD writes it", "nll",
            "CA-MKD, arXiv 2201.00007"),
    setting("fusion", "{method: similarity, prototypes: kmeans}", "Several prototypes a teacher", "teachers"),
    setting("fusion", "{method: router, kind: mlp, per_layer: true}", "A gate with a hidden layer, one a layer",
            "student, router"),
    setting("control.shuffle", "rows", "Control: every row gets the teacher states of another row"),
    setting("control.shuffle", "rows_of_task", "Control: every row gets the teacher states of another row of its task"),
    setting("control.shuffle", "positions", "Control: every position gets the teacher state of another one of its row"),
    setting("freeze", "{attention: true, until_step: 1}", "The student's attention rests at first"),
    setting("freeze", "{layer_groups: 2, unfreeze_every: 1}", "Layers unfreeze group by group"),
    setting("freeze", "{projectors_after: 1}", "The projectors rest after a warm-up", "projectors",
            losses__kv__weight=1),
    setting("accumulation", "{steps: [1, 2], at: [0.0, 0.5]}", "Accumulation grows over the run"),
    setting("monitor.loss_scales_every", "1", "Log every term's share of the gradient"),
)  # fmt: skip
