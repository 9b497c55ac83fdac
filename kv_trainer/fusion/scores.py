"""Shares by what each teacher predicts for the sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import FusionInputs, Tempered


@dataclass
class Confidence(Tempered):
    """Sample by sample, the teacher that finds the supervised text likelier counts more.

    CE_m is the sample's negative log-likelihood in nats a *student* token: dividing all teachers by the same count
    keeps unlike tokenizers comparable, as a teacher that cuts the text finer has more, easier tokens.
    form: softmax, w_m = softmax(-CE_m / temperature); or ca_mkd, w_m = (1 - softmax(CE_m / temperature)) / (M - 1),
    which never gives a teacher more than 1 / (M - 1), so with two it is the same, and with many nearly uniform.
    Source: CA-MKD, arXiv 2201.00007, eq. 4; the softmax form is this package's.
    """

    form: Literal["softmax", "ca_mkd"] = "softmax"

    needs: ClassVar[frozenset[str]] = frozenset({"nll"})
    source: ClassVar[str] = "CA-MKD, arXiv 2201.00007"

    def shares(self, inputs: FusionInputs) -> Tensor:
        assert inputs.nll is not None
        nats = inputs.nll / inputs.tokens.clamp_min(1) / self.temperature
        if self.form == "softmax":
            return torch.softmax(-nats, dim=0)
        return (1 - torch.softmax(nats, dim=0)) / (len(nats) - 1)


@dataclass
class Entropy(Tempered):
    """Sample by sample, the teacher that is surer of its own predictions counts more; the text's tokens do not count.

    w_m = softmax(-H_m / temperature), H_m the mean entropy of teacher m's next-token distribution over its supervised
    positions, as a share of the largest possible, log of its vocabulary: unlike vocabularies stay comparable.
    Source: EBKD, Kwon et al., ICASSP 2020; the normalisation is this package's.
    """

    temperature: float = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    source: ClassVar[str] = "EBKD, Kwon et al., ICASSP 2020"

    def shares(self, inputs: FusionInputs) -> Tensor:
        assert inputs.entropy is not None
        return torch.softmax(-inputs.entropy / self.temperature, dim=0)


