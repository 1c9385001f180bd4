"""A sampling parameter that an engine claims changes what its library is given.

A field that is added to `Sampling` is claimed by no engine until the engine translates it: then it
needs a value here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from headrace import engines
from headrace.core.model import ModelFile
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.engines import anthropic, echo
from headrace.engines.base import EngineRequest, OpenRequest
from headrace.engines.llamacpp import call as llamacpp
from headrace.engines.openai.protocol import generate_body
from headrace.engines.openvino import call as openvino
from headrace.engines.vllm import call as vllm
from headrace.models.providers import PROVIDERS

VALUES: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.25,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "seed": 11,
    "stop_token_ids": (5,),
    "ignore_eos": True,
    "logprobs": 0,
    "logit_bias": {5: -1.0},
}
# llama.cpp is not told of them: the call ends at the token (test_llamacpp_plan.py).
ENDED_HERE = {"stop_token_ids"}


def request(**sampling: Any) -> EngineRequest:
    return EngineRequest(
        token_ids=(1, 2),
        max_tokens=sampling.get("max_tokens", 9),
        sampling=Sampling(**{"seed": 1, **sampling}),
    )


def openvino_settings(given: EngineRequest) -> object:
    return openvino.settings_of(given, frozenset(given.sampling.stop_token_ids))


LIBRARIES: list[tuple[str, Iterable[str], Callable[[EngineRequest], object]]] = [
    ("llamacpp", llamacpp.HONOURED - ENDED_HERE, llamacpp.fields),
    ("openvino", openvino.HONOURED, openvino_settings),
    ("vllm", vllm.HONOURED, lambda given: vllm.keywords(given, {})),
]


@pytest.mark.parametrize(
    ("name", "translate"),
    [
        pytest.param(name, translate, id=f"{engine}-{name}")
        for engine, honoured, translate in LIBRARIES
        for name in sorted(honoured)
    ],
)
def test_each_claim_changes_the_call(
    name: str, translate: Callable[[EngineRequest], object]
) -> None:
    """W11: honoured, or not claimed."""
    assert translate(request(**{name: VALUES[name]})) != translate(request())


@pytest.mark.parametrize(
    "name", [name for name, row in PROVIDERS.items() if row.engine == "openai"]
)
def test_each_claim_of_a_provider_changes_the_body(name: str) -> None:
    """W11: in a chat, as it is asked of most of them."""
    provider = PROVIDERS[name]

    def body(**sampling: Any) -> bytes:
        chat = GenerateRequest(messages=(Message("user", "x"),), sampling=Sampling(**sampling))
        return generate_body(chat, "m", provider)[1]

    for field in provider.sampling - {"n"}:
        assert body(**{field: VALUES[field]}) != body(), field


@pytest.mark.engines
def test_each_claim_of_anthropic_changes_the_body() -> None:
    file = ModelFile(path="m", format="remote", provider="anthropic")
    options = {"api_version": "2023-06-01", "api_key": "sk-ant"}
    engine: Any = engines.open_engine("anthropic", OpenRequest(model=file, options=options))
    assert isinstance(engine, anthropic.Engine)

    def body(**sampling: Any) -> object:
        chat = GenerateRequest(messages=(Message("user", "x"),), sampling=Sampling(**sampling))
        return engine._body(chat)

    for field in engine.facts.capabilities.sampling:
        assert body(**{field: VALUES[field]}) != body(), field


@pytest.mark.engines
def test_each_claim_of_transformers_changes_its_rules_or_the_answer() -> None:
    from headrace.engines.transformers.answer import HONOURED, Rules, rules

    class Defaults:
        do_sample = False

    for name in Rules._fields:
        assert rules(Sampling(**{name: VALUES[name]}), Defaults()) != rules(Sampling(), Defaults())
    assert HONOURED - set(Rules._fields) == {
        *("max_tokens", "min_tokens", "seed", "stop_token_ids", "ignore_eos", "logit_bias")
    }


def test_claims_are_fields_of_sampling() -> None:
    """A name that no request can have is no claim; stop strings are the worker's."""
    fields = set(Sampling.__struct_fields__) - {"stop"}
    for claims in (llamacpp.HONOURED, openvino.HONOURED, vllm.HONOURED, echo._SAMPLING):
        assert claims <= fields
    assert VALUES.keys() <= fields
