"""From a model's last hidden states to its logits, a few positions at a time; and the tokens two vocabularies share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Head = Callable[[Tensor], Tensor]


def output_head(model: PreTrainedModel) -> Head:
    """[n, C] last hidden states -> [n, V] logits, as the model itself makes them.

    Families scale or cap their logits behind the head, each under its own config name; the result is compared with
    the model's own logits once, here. ValueError where they differ.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def head(hidden: Tensor) -> Tensor:
        logits = model.get_output_embeddings()(hidden.to(model.dtype)) * scale / divisor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    with torch.no_grad():
        probe = torch.arange(2, device=model.device)[None]
        theirs = model(input_ids=probe, use_cache=False).logits.float()
        ours = head(model.base_model(input_ids=probe, use_cache=False)[0]).float()
    ours = ours.to(theirs.device)  # a device_map may have them apart
    if (theirs - ours).abs().max() > 1e-2 * theirs.abs().max().clamp_min(1e-6):
        raise ValueError(
            f"The logits of model_type '{config.model_type}' are not its head on its last hidden states, so a sample's "
            "likelihood cannot be had cheaply; use fusion: {method: uniform} and no loss that needs teacher logits."
        )
    return head


def shared_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]] | None:
    """Ids, in both vocabularies, of the tokens with the same text; None where the vocabularies are the same."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return None
    pairs = sorted((i, theirs[token]) for token, i in ours.items() if token in theirs)
    for kind in ("eos_token", "bos_token"):  # the same meaning under another name
        pair = (getattr(student, f"{kind}_id"), getattr(teacher, f"{kind}_id"))
        if None not in pair and not {pair[0]} & {a for a, _ in pairs} and not {pair[1]} & {b for _, b in pairs}:
            pairs.append(pair)
    return [a for a, _ in pairs], [b for _, b in pairs]
