"""Sampled answers that a seed decides: every row draws from a stream of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from .arguments import EvaluationConfig


class RowSampler(LogitsProcessor):
    """Sampling for a decoder that takes the best token: only the drawn one is left with a finite score.

    draws: [B, N] numbers in 0..1, one for each row and new token; start: the padded length of the prompts. A row's
    draws depend on nothing else, so neither its neighbours nor the random state of torch do anything to its answer.
    """

    def __init__(self, config: EvaluationConfig, draws: Tensor, start: int) -> None:
        self.draws, self.start = draws, start
        self.warpers = [TemperatureLogitsWarper(config.temperature), TopPLogitsWarper(config.top_p)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [B, T], scores [B, V] -> [B, V]."""
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        heights = scores.float().softmax(-1).cumsum(-1)  # [B, V]: each token's share is a step up from the one before
        drawn = self.draws[:, input_ids.shape[1] - self.start].to(heights) * heights[:, -1]
        # right: the first token that reaches above the draw, so that one without a share is never taken.
        token = torch.searchsorted(heights, drawn[:, None], right=True).clamp(max=scores.shape[-1] - 1)
        # A draw that rounds up to the whole height would take the last token, whatever its share.
        token = torch.where(scores.gather(-1, token).isfinite(), token, scores.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def decoding(config: EvaluationConfig, rows: list[int], start: int) -> LogitsProcessorList:
    """What generate() needs beside greedy decoding: nothing, or where answers are sampled the draws of these rows."""
    if not config.do_sample:
        return LogitsProcessorList()
    streams = [np.random.default_rng((config.seed, row)).random(config.max_new_tokens) for row in rows]
    return LogitsProcessorList([RowSampler(config, torch.from_numpy(np.stack(streams)), start)])
