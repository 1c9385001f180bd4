"""Which prompt precedes the texts of a request for embeddings."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.core.errors import ConfigError, InvalidRequest, Unsupported
from headrace.core.model import ModelFile, ModelSpec, Preset
from headrace.core.preset import applied
from headrace.core.request import EmbedRequest
from headrace.worker.embed_prompts import EmbedPrompts, embed_prompts

E5 = {"query": "query: ", "passage": "passage: "}
ONE_SIDE = {"query": "Instruct: find\nQuery: "}
GEMMA = {
    "query": "task: q | ",
    "document": "title: none | ",
    "Clustering": "c",
    "STS": "s",
}
NONE = {"query": "", "document": ""}


@pytest.mark.parametrize(
    ("texts", "kind", "text"),
    [
        (E5, "query", "query: "),
        (E5, "document", "passage: "),
        (E5, None, ""),
        (ONE_SIDE, "document", ""),
        (GEMMA, "clustering", "c"),
        (GEMMA, "similarity", "s"),
        (NONE, "query", ""),
        (NONE, "classification", ""),
    ],
)
def test_by_what_the_texts_are_for(texts: dict[str, str], kind: Any, text: str) -> None:
    """Issue 17.6: the names that models give to their prompts."""
    assert EmbedPrompts(texts).text(None, kind) == text


@pytest.mark.parametrize(
    ("texts", "kind"), [({}, "query"), (E5, "clustering"), ({"a": "b"}, "query")]
)
def test_a_kind_that_the_model_does_not_have_is_refused(texts: dict[str, str], kind: Any) -> None:
    """Issue 17.6: never a vector that is not what was asked for."""
    with pytest.raises(InvalidRequest, match=f"no prompt for {kind}; it has"):
        EmbedPrompts(texts).text(None, kind)


def test_the_settings_come_before_the_folder() -> None:
    file = ModelFile(path="", format="none", prompts=E5, default_prompt="passage")
    spec = ModelSpec(name="m", model="m", prompts={"passage": "p: "})
    assert embed_prompts(spec, file).text(None, None) == "p: "
    chosen = ModelSpec(name="m", model="m", prompt_name="query")
    assert embed_prompts(chosen, file).text(None, None) == "query: "
    with pytest.raises(ConfigError, match="no prompt 'q'; it has passage, query"):
        embed_prompts(ModelSpec(name="m", model="m", prompt_name="q"), file)
    ranks = ModelFile(path="", format="none", task="rerank", prompts=E5, default_prompt="query")
    with pytest.raises(ConfigError, match="ranks"):
        embed_prompts(ModelSpec(name="m", model="m"), ranks)


def test_a_prompt_that_pooling_leaves_out_is_the_same_for_all() -> None:
    prompts = EmbedPrompts(E5, "query", are_fixed=True)
    assert prompts.text(None, None) == prompts.text("query", None) == "query: "
    with pytest.raises(Unsupported, match="prompt_name"):
        prompts.text("passage", None)


def test_a_preset_chooses_for_requests_that_do_not() -> None:
    """Issue 17.6: several names over one model, one for queries and one for documents."""
    preset = Preset(prompt_name="query")
    plain = EmbedRequest(inputs=("a",))
    chosen = applied(preset, plain)
    assert isinstance(chosen, EmbedRequest)
    assert (chosen.inputs, chosen.prompt_name) == (("a",), "query")
    for request in (
        EmbedRequest(inputs=("a",), prompt_name="passage"),
        EmbedRequest(inputs=("a",), input_type="document"),
    ):
        assert applied(preset, request) == request
    assert applied(Preset(), plain) is plain
