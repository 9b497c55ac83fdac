"""From a model's last hidden states to its logits, a few positions at a time; and the tokens two vocabularies share."""

from __future__ import annotations

import json
import re
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
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, same_width: bool = True
) -> tuple[list[int], list[int]] | None:
    """Ids, in both vocabularies, of the tokens that stand for the same bytes; None where the heads are the same.

    same_width: the heads have as many rows. Those of one vocabulary may be padded unlike: then its tokens are named.
    """
    if student.get_vocab() == teacher.get_vocab() and same_width:
        return None
    ours, theirs = meanings(student), meanings(teacher)
    pairs = sorted((i, theirs[token]) for token, i in ours.items() if token in theirs)
    for kind in ("eos_token", "bos_token"):  # the same meaning under another name
        pair = (getattr(student, f"{kind}_id"), getattr(teacher, f"{kind}_id"))
        if None not in pair and not {pair[0]} & {a for a, _ in pairs} and not {pair[1]} & {b for _, b in pairs}:
            pairs.append(pair)
    return [a for a, _ in pairs], [b for _, b in pairs]


def meanings(tokenizer: PreTrainedTokenizerBase) -> dict[bytes | str, int]:
    """The bytes that each token stands for -> its id; a special token, such as a mark of a chat, by its own name.

    Byte-level vocabularies write a space as U+0120, SentencePiece ones as U+2581 and single bytes as <0x20>: the same
    text has other names in them.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = json.dumps([rules.get("decoder"), rules.get("pre_tokenizer"), rules.get("normalizer")])
    byte_level, start = '"ByteLevel"' in parts, rules["model"].get("continuing_subword_prefix")
    inside = start if rules["model"].get("type") == "WordPiece" else None
    added = tokenizer.added_tokens_decoder
    found: dict[bytes | str, int] = {}
    # A token of a whole character before the byte of the same.
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda pair: bool(BYTE.fullmatch(pair[0]))):
        special = i in added and added[i].special
        # Of a run of blanks merges make the same token as of its name: Gemma lists its own as added ones too.
        literal = i in added and (byte_level or token.strip("\u2581"))
        name = token if special else token.encode() if literal else bytes_of(token, byte_level, inside)
        found.setdefault(name, i)
    return found


def bytes_of(token: str, byte_level: bool, inside: str | None) -> bytes:
    """inside: what WordPiece writes before a piece inside a word; a word's first piece stands for the space too."""
    if inside is not None:
        if token.startswith(inside):
            return token[len(inside) :].encode()
        return (" " * token[0].isalnum() + token).encode()
    if byte_level and all(c in ALPHABET for c in token):
        return bytes(ALPHABET[c] for c in token)
    if match := BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """The character with which byte-level vocabularies write each byte (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET, BYTE = byte_alphabet(), re.compile(r"<0x([0-9A-F]{2})>")
