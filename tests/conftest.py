"""What every test may use: tiny models and tokenizers (helpers_models.py), one thread, no network."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and datasets read it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable

import pytest
import torch
from helpers_models import build_model, build_tokenizer
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerFast

settings.register_profile("tests", max_examples=50, deadline=None, derandomize=True, database=None)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Trainer collects garbage in every run; what was imported is none, and looking through it takes half the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(family, seed=0, **config)``, see helpers_models.build_model."""
    return build_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``tiny_tokenizer(merges=40, bos=False, chat_template=None)``, see helpers_models.build_tokenizer."""
    return build_tokenizer


@pytest.fixture
def plain(tiny_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer without a start token and without a chat template."""
    return tiny_tokenizer()
