"""The trainable maps between the student and one teacher, as the recipe asks for them; the bridge holds them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .alignment.heads import AUTO_MLP_RATIO, TeacherProjectors
from .arguments import MultiTeacherKVConfig
from .types import KVShape


def head_projectors(
    student: KVShape, teacher: KVShape, args: MultiTeacherKVConfig, compared: Collection[int]
) -> TeacherProjectors:
    """The maps of keys and values; those of layers that are not `compared` are never trained.

    DDP waits for the gradient of every parameter that has one.
    """
    knobs = args.projector
    ratio = AUTO_MLP_RATIO if knobs.mlp_ratio == "auto" else knobs.mlp_ratio
    found = TeacherProjectors(
        student, teacher, knobs.direction, method=knobs.method, init=knobs.init, mlp_ratio=ratio, dropout=knobs.dropout,
        layer_norm=knobs.layer_norm, activation=knobs.activation,
    )  # fmt: skip
    for maps in (found.keys, found.values):
        for layer, module in enumerate(maps):
            module.requires_grad_(layer in compared)
    return found


def hidden_projectors(student: KVShape, teacher: KVShape) -> nn.ModuleList:
    """For the embeddings and every student layer, a linear map to the teacher's width; none where they agree."""
    same = student.hidden_size == teacher.hidden_size
    maps = (nn.Identity() if same else nn.Linear(student.hidden_size, teacher.hidden_size, bias=False)
            for _ in range(student.num_layers + 1))  # fmt: skip
    return nn.ModuleList(maps)
