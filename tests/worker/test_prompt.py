from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from tests.worker.rig import ask

from headrace.core.constraint import Constraint
from headrace.core.errors import ConfigError, ContextOverflow, InvalidRequest, Unsupported
from headrace.core.model import Capabilities, ModelSpec
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.engines.base import EngineFacts
from headrace.worker.prompt import Prompter, check_supported, max_new_tokens

BOS = 1


class Tokenizer:
    """One token for each character, and a BOS where special tokens are added."""

    def __init__(self, **facts: Any) -> None:
        self.facts = EngineFacts(
            **(
                {
                    "device": "cpu",
                    "context_length": 20,
                    "max_running": 1,
                    "capabilities": Capabilities(sampling=frozenset({"max_tokens", "seed"})),
                    "chat_template": "{{ messages[-1].content }}",
                    "special_tokens": {"bos_token": "^"},
                }
                | facts
            )
        )

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        ids = [BOS if letter == "^" else ord(letter) for letter in text]
        return [BOS, *ids] if add_special else ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        return self.detokenize(token_ids)


def prompter(spec: ModelSpec | None = None, **facts: Any) -> Prompter:
    engine: Any = Tokenizer(**facts)
    return Prompter(spec or ModelSpec(name="m", model="m"), engine)


def chat(content: str, **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=(Message("user", content),), **fields)


def of(max_tokens: int | None, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt="p", sampling=Sampling(max_tokens=max_tokens), **fields)


@pytest.mark.parametrize(("prompt_tokens", "left"), [(4, 16), (5, 15), (19, 1)])
def test_a_default_gets_what_is_left(prompt_tokens: int, left: int) -> None:
    """Issue 12.6: 16 tokens that the client did not ask for are no reason to refuse."""
    assert max_new_tokens(of(16, fit_max_tokens=True), prompt_tokens, 20) == left
    with pytest.raises(ContextOverflow) as caught:
        max_new_tokens(of(16, fit_max_tokens=True), 20, 20)
    assert caught.value.param == "prompt"


def test_room_at_the_edges() -> None:
    """W6: exactly at, one over, ten times over."""
    assert max_new_tokens(of(None), 5, 20) == 15
    assert max_new_tokens(of(None), 19, 20) == 1
    assert max_new_tokens(of(5), 15, 20) == 5
    for prompt_tokens in (20, 21, 200):
        with pytest.raises(ContextOverflow, match=f"{prompt_tokens} tokens.*length is 20"):
            max_new_tokens(of(None), prompt_tokens, 20)
    with pytest.raises(ContextOverflow, match=r"together 21;.*is 20") as caught:
        max_new_tokens(of(6), 15, 20)
    assert caught.value.param == "max_tokens"


def test_a_request_gets_what_the_context_leaves() -> None:
    """W6: prompt and answer together fill the context, to the token."""
    assert prompter().job(ask("a" * 18)).choices[0].max_tokens == 1
    with pytest.raises(ContextOverflow):
        prompter().job(ask("a" * 19))
    with pytest.raises(ContextOverflow):
        prompter().job(ask("a" * 200))
    with pytest.raises(ContextOverflow):
        prompter().job(ask("aaa", max_tokens=17))
    assert prompter().job(ask("aaa", max_tokens=16)).choices[0].max_tokens == 16


def test_a_request_may_ask_for_less_context_but_never_for_more() -> None:
    """W6: context_length of a request."""
    assert prompter().job(ask("aaa", context_length=6)).choices[0].max_tokens == 2
    assert prompter().job(ask("aaa", context_length=20)).choices[0].max_tokens == 16
    with pytest.raises(ContextOverflow):
        prompter().job(ask("aaa", context_length=4))
    for wrong in (21, 0, -1):
        with pytest.raises(InvalidRequest) as caught:
            prompter().job(ask("aaa", context_length=wrong))
        assert caught.value.param == "context_length"


def test_the_first_token_is_never_there_twice() -> None:
    """W25: a template that writes BOS itself gets no second one."""
    writes = "^{{ messages[-1].content }}"
    assert prompter(chat_template=writes).job(chat("a")).choices[0].token_ids == (BOS, ord("a"))
    assert prompter().job(chat("a")).choices[0].token_ids == (BOS, ord("a"))
    assert prompter(special_tokens={}).job(chat("a")).choices[0].token_ids == (BOS, ord("a"))


def test_a_count_is_what_a_generation_would_compute() -> None:
    """W21: text, and messages through the template."""
    maker = prompter(chat_template="<{{ messages[-1].content }}>")
    messages = (Message("user", "abc"),)
    counted = maker.count(CountRequest(messages=messages))
    assert counted == maker.job(GenerateRequest(messages=messages)).choices[0].token_ids
    assert len(maker.count(CountRequest(text="abc"))) == 3
    assert len(maker.count(CountRequest(text="abc", add_special=True))) == 4
    assert maker.count(CountRequest(text="")) == ()


def test_token_ids_are_taken_as_they_are() -> None:
    """W9: a prompt of token ids."""
    assert prompter().job(ask((7, 8))).choices[0].token_ids == (7, 8)


def test_an_empty_prompt_is_refused_where_no_token_remains() -> None:
    class Bare(Tokenizer):
        def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
            return [ord(letter) for letter in text]

    engine: Any = Bare()
    bare = Prompter(ModelSpec(name="m", model="m"), engine)
    for request in (ask(""), chat("")):
        with pytest.raises(InvalidRequest, match="empty"):
            bare.job(request)
    assert prompter().job(ask("")).choices[0].token_ids == (BOS,)


def test_what_the_engine_cannot_do_is_refused_by_name() -> None:
    """W11: none is dropped in silence."""
    nothing = Capabilities(token_prompts=False)
    given: dict[str, Any] = {
        "max_tokens": 1,
        "min_tokens": 1,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 1,
        "min_p": 0.5,
        "presence_penalty": 1,
        "frequency_penalty": 1,
        "repetition_penalty": 1.1,
        "seed": 1,
        "stop_token_ids": (1,),
        "ignore_eos": True,
        "logprobs": 0,
        "logit_bias": {1: 1.0},
    }
    assert given.keys() | {"stop"} == set(Sampling.__struct_fields__)
    for name, value in given.items():
        with pytest.raises(Unsupported, match=name) as caught:
            check_supported(ask(**{name: value}), nothing)
        assert caught.value.param == name
        check_supported(ask(**{name: value}), Capabilities(sampling=frozenset({name})))
    check_supported(ask(stop=("x",)), nothing)
    with pytest.raises(Unsupported) as caught:
        check_supported(ask(constraint=Constraint(json_schema={})), nothing)
    assert caught.value.param == "response_format"
    with pytest.raises(Unsupported) as caught:
        check_supported(ask((1,)), nothing)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("min_tokens", (0,)),
        ("temperature", (1, 1.0)),
        ("top_p", (1, 1.0)),
        ("top_k", (0, -1)),
        ("min_p", (0, 0.0)),
        ("presence_penalty", (0, 0.0, -0.0)),
        ("frequency_penalty", (0, 0.0)),
        ("repetition_penalty", (1, 1.0)),
        ("logit_bias", ({}, {5: 0.0})),
    ],
)
def test_what_changes_nothing_needs_no_support(name: str, values: tuple[Any, ...]) -> None:
    """Issue 14: it is left out for an engine without the field, and passed to one that has it."""
    for value in values:
        sampling = Sampling(**{name: value})
        assert sampling.without_neutral(frozenset()) == Sampling()
        assert sampling.without_neutral({name}) == sampling


def test_what_changes_something_stays() -> None:
    sampling = Sampling(top_p=0.99, logit_bias={5: 0.0, 6: 1.0})
    assert sampling.without_neutral(frozenset()) == sampling


def test_stop_strings_of_the_request_come_before_the_models() -> None:
    """W12: both count, in this order."""
    spec = ModelSpec(name="m", model="m", stop=("<end>",))
    assert prompter(spec).job(ask(stop=("x",))).stops == ("x", "<end>")


def test_each_choice_of_a_seeded_request_is_its_own_draw() -> None:
    """W11: n with a seed."""
    seeds = [one.sampling.seed for one in prompter().job(ask(n=3, seed=5)).choices]
    assert seeds == [5, 6, 7]
    assert [one.sampling.seed for one in prompter().job(ask(n=2)).choices] == [None, None]
    highest = (1 << 64) - 1
    job = prompter().job(ask(n=2, seed=highest))
    assert len({one.sampling.seed for one in job.choices}) == 2


def test_echo_is_the_prompt_as_text() -> None:
    """W11: echo, of text and of token ids; refused where it has no meaning."""
    assert prompter().job(ask("ab", echo=True)).echo == "ab"
    assert prompter().job(ask((97, 98), echo=True)).echo == "ab"
    assert prompter().job(ask("ab")).echo == ""
    with pytest.raises(InvalidRequest) as caught:
        prompter().job(chat("a", echo=True))
    assert caught.value.param == "echo"
    able = Capabilities(sampling=frozenset({"logprobs"}))
    with pytest.raises(Unsupported) as caught:
        prompter(capabilities=able).job(ask(echo=True, logprobs=1))
    assert caught.value.param == "echo"


def test_the_specs_template_overrides_the_models() -> None:
    """W25: override for each model."""
    spec = ModelSpec(name="m", model="m", chat_template="[{{ messages[0].content }}]")
    ids = prompter(spec).job(chat("a")).choices[0].token_ids
    assert ids == (BOS, ord("["), ord("a"), ord("]"))


def test_without_a_template_there_is_no_chat() -> None:
    """W25: refused, never guessed; a broken template of the model leaves completion."""
    with pytest.raises(Unsupported, match="no chat template") as caught:
        prompter(chat_template=None).job(chat("a"))
    assert caught.value.param == "messages"
    broken = prompter(chat_template="{% if %}")
    assert broken.note is not None
    assert "no chat" in broken.note
    assert broken.roles == ()
    assert broken.job(ask("a")).choices
    with pytest.raises(ConfigError):
        prompter(ModelSpec(name="m", model="m", chat_template="{% if %}"))


def test_a_job_leaves_the_request_as_it_was() -> None:
    """W9: the caller's objects are never changed."""
    options = {"flag": [1]}
    request = chat("a", n=2, sampling=Sampling(seed=1), template_options=options)
    before = msgspec.msgpack.encode(request)
    prompter().job(request)
    assert msgspec.msgpack.encode(request) == before
    assert options == {"flag": [1]}


def test_min_tokens_counts_what_was_answered_before() -> None:
    """W11, W19: a continued answer needs only the rest; more than there is room for is refused."""
    able = Capabilities(sampling=frozenset({"min_tokens"}), resume=True)
    for answered, left in ((), 5), ((97, 98), 3), ((97,) * 7, None):
        (choice,) = (
            prompter(capabilities=able).job(ask("abc", min_tokens=5, answered=answered)).choices
        )
        assert choice.sampling.min_tokens == left
    with pytest.raises(InvalidRequest) as caught:
        prompter(capabilities=able).job(ask("abc", min_tokens=30))
    assert caught.value.param == "min_tokens"
