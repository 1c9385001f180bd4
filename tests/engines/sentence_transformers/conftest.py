"""Real models: MiniLM from the index, and a tiny cross-encoder of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.engines.base import OpenRequest
from headrace.models.inspect import inspect


@pytest.fixture(scope="session")
def ranker_path(minilm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with one score, of random weights, with the tokenizer of MiniLM."""
    return make_ranker(tmp_path_factory.mktemp("ranker"), minilm_path)


def make_ranker(
    path: Path, tokenizer: Path, scores: int = 1, *, kind: str = "bert", length: int = 128
) -> Path:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(7)
    heads = 2 if kind == "bert" else 12
    config = AutoConfig.for_model(
        kind, vocab_size=30522, hidden_size=16 * heads, num_hidden_layers=2,
        num_attention_heads=heads, intermediate_size=64, max_position_embeddings=length,
        num_labels=scores, initializer_range=0.5,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(
        tokenizer, model_max_length=length - (0 if kind == "bert" else 2)
    ).save_pretrained(path)
    return path


def opening(path: Path, **given: Any) -> OpenRequest:
    """What an engine is opened with for the model in a folder."""
    file = inspect(path)
    fields = {name: given.pop(name) for name in ("context_length", "max_running") if name in given}
    device = given.pop("device", "cpu")
    return OpenRequest(model=file, task=file.task, device=device, options=given, **fields)
