"""Embeddings and rankings on OpenVINO are those of sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.model import ModelFile, Task
from headrace.engines.base import OpenRequest
from headrace.engines.openvino import convert
from headrace.engines.openvino.engine import Engine
from headrace.models.inspect import inspect

pytestmark = pytest.mark.engines

TEXTS = ("hello", "the quick brown fox " * 5, "ünïcödé", "a b c d")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz")


def made(folder: Path, kind: str) -> Path:
    """Save a tiny BERT with random weights and a vocabulary of letters."""
    import torch
    import transformers

    torch.manual_seed(1)
    (folder / "vocab.txt").write_text("\n".join((*WORDS, *(f"##{w}" for w in WORDS[5:]))))
    config = transformers.BertConfig(
        vocab_size=2 * len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        num_labels=1,
        initializer_range=0.4,
    )
    getattr(transformers, kind)(config).eval().save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def opened(source: Path, home: Path, task: Task) -> tuple[Any, ModelFile]:
    found = convert(inspect(source), home)
    engine: Any = Engine(OpenRequest(model=found, task=task))
    return engine, found


def test_vectors_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    import numpy as np

    library = import_module("sentence_transformers")
    modules = import_module("sentence_transformers.sentence_transformer.modules")
    (tmp_path / "bert").mkdir()
    module = modules.Transformer(str(made(tmp_path / "bert", "BertModel")), max_seq_length=100)
    theirs = library.SentenceTransformer(
        modules=[module, modules.Pooling(32, pooling_mode="mean"), modules.Normalize()],
        device="cpu",
    )
    theirs.save(str(tmp_path / "st"))
    engine, found = opened(tmp_path / "st", tmp_path / "home", "embed")
    assert (found.task, found.context_length) == ("embed", 100)
    assert engine.facts.capabilities.dimensions == 32
    ids = [engine.tokenize(text, add_special=True) for text in TEXTS]
    assert ids == [list(row) for row in theirs.tokenizer(list(TEXTS))["input_ids"]]
    ours = np.array([np.frombuffer(row, "<f4") for row in engine.embed(ids)])
    assert abs(ours - theirs.encode(list(TEXTS))).max() < 1e-5
    alone = np.frombuffer(engine.embed(ids[:1])[0], "<f4")
    assert abs(alone - ours[0]).max() < 1e-5
    with pytest.raises(InvalidRequest):
        engine.embed([[10**6]])
    engine.close()


def test_scores_are_those_of_a_cross_encoder(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    source = made(tmp_path / "bert", "BertForSequenceClassification")
    engine, found = opened(source, tmp_path / "home", "rerank")
    assert found.task == "rerank"
    theirs = import_module("sentence_transformers").CrossEncoder(str(source), device="cpu")
    pairs = [engine.pair("what is it", text) for text in TEXTS]
    for pair, text in zip(pairs, TEXTS, strict=True):
        encoded = theirs.tokenizer("what is it", text)
        assert list(pair.token_ids) == encoded["input_ids"]
        assert pair.second == encoded["token_type_ids"].index(1)
    wanted = theirs.predict([("what is it", text) for text in TEXTS])
    assert engine.score(pairs) == pytest.approx(list(wanted), abs=1e-5)
    assert len({round(one, 3) for one in wanted}) > 1
    engine.close()
