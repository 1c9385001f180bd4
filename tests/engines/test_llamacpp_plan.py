from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ContextOverflow,
    GenerationFailed,
    InvalidRequest,
    LoadFailed,
    OutOfMemory,
)
from headrace.core.events import TokenLogprob, TopLogprob
from headrace.core.model import ModelFile
from headrace.core.sampling import Sampling
from headrace.engines.base import (
    Admitted,
    EngineRequest,
    OpenRequest,
    RawDelta,
    RawEvent,
    RawFinish,
)
from headrace.engines.llamacpp import Options, plan_context, settled
from headrace.engines.llamacpp.call import Call, error_from
from headrace.engines.llamacpp.call import fields as body_fields
from headrace.engines.llamacpp.engine import _device

FILE = ModelFile(path="x.gguf", format="gguf", context_length=8192, kv_bytes_per_token=1000)
PLENTY = 1 << 40


def plan(memory: int | None = PLENTY, **fields: Any) -> tuple[int, int, int]:
    """Slots, context length, number of notes."""
    options = Options(**fields.pop("options", {}))
    request = OpenRequest(model=FILE, **fields)
    made = plan_context(request, options, memory)
    return made.slots, made.context_length, len(made.notes)


def test_the_context_is_the_models_unless_asked_otherwise() -> None:
    """W6: explicit, then the model's own, then 4096."""
    assert plan()[1:] == (8192, 0)
    assert plan(context_length=512)[1:] == (512, 0)
    bare = OpenRequest(model=ModelFile(path="x", format="gguf"))
    assert plan_context(bare, settled(bare), 1).context_length == 4096


def test_slots_are_as_many_as_asked_for() -> None:
    """W20: a limit for each model; by default what the engine can batch."""
    assert plan(options={"slots": 7})[0] == 7
    assert plan(max_running=2)[0] == 2
    assert plan(max_running=100)[0] == plan()[0]


def test_scarce_memory_takes_slots_first_and_then_context() -> None:
    """W6: what was asked for is kept; what was not gives way, with a note."""
    slots, context, notes = plan(memory=4 * 8192 * 1000)
    assert 1 <= slots < plan()[0]
    assert (context, notes) == (8192, 1)
    slots, context, notes = plan(memory=4 * 4096 * 1000)
    assert (slots, notes) == (1, 2)
    assert 256 <= context <= 4096
    assert context % 256 == 0
    assert plan(memory=1000, options={"slots": 3}, context_length=8192) == (3, 8192, 0)
    assert plan(memory=None) == plan()


def test_a_smaller_cache_type_holds_more() -> None:
    small = 8192 * 1000 * 2
    assert plan(memory=small)[1] < plan(memory=small, options={"kv_type": "q4_0"})[1]


@pytest.mark.parametrize(
    ("names", "wanted", "device"),
    [
        (["CPU"], "auto", "cpu"),
        (["CUDA0", "CPU"], "auto", "cuda"),
        (["MTL0", "CPU"], "auto", "mps"),
        (["Metal", "CPU"], "mps", "mps"),
        (["CUDA0", "CPU"], "cpu", "cpu"),
        (["CPU", "ROCm0"], "auto", "rocm"),
        (["Vulkan0", "CPU"], "auto", "vulkan"),
        (["Vulkan0", "CUDA0", "CPU"], "auto", "cuda"),
        (["Vulkan0", "CUDA0", "CPU"], "vulkan", "vulkan"),
        (["BLAS", "CPU"], "auto", "cpu"),
    ],
)
def test_the_device_is_the_explicit_one_or_the_best(
    names: list[str], wanted: str, device: str
) -> None:
    """W4: explicit, then a GPU, then cpu. Issue 17: builds for ROCm and Vulkan compute there."""
    assert _device(wanted, [{"name": name} for name in names]) == device


def test_a_device_that_is_not_there_is_refused() -> None:
    """W4: never another device than the one asked for."""
    with pytest.raises(LoadFailed, match="no device cuda"):
        _device("cuda", [{"name": "CPU"}])


def body(max_tokens: int = 5, schema: dict[str, Any] | None = None, **fields: Any) -> Any:
    request = EngineRequest(
        token_ids=(1, 2, 3),
        max_tokens=max_tokens,
        sampling=Sampling(**fields),
        constraint=None if schema is None else Constraint(json_schema=schema),
    )
    return json.loads(msgspec.json.encode(body_fields(request)))


@pytest.mark.parametrize(
    ("ours", "value", "theirs", "sent"),
    [
        ("temperature", 0, "temperature", 0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 3, "top_k", 3),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", 1.5, "presence_penalty", 1.5),
        ("frequency_penalty", -1, "frequency_penalty", -1),
        ("repetition_penalty", 1.2, "repeat_penalty", 1.2),
        ("seed", 7, "seed", 7),
        ("ignore_eos", True, "ignore_eos", True),
        ("logprobs", 0, "logprobs", 1),
        ("logprobs", 4, "logprobs", 4),
        ("logit_bias", {5: -100.0}, "logit_bias", [[5, -100.0]]),
    ],
)
def test_each_parameter_is_sent_under_its_name_there(
    ours: str, value: Any, theirs: str, sent: Any
) -> None:
    """W11: honoured, and nothing sent that was not asked for."""
    assert body(**{ours: value})[theirs] == sent
    assert theirs not in body()


def test_the_rest_of_the_body() -> None:
    sent = body(max_tokens=9)
    assert sent["prompt"] == [1, 2, 3]
    assert sent["max_tokens"] == 9
    assert sent["repeat_last_n"] == 12
    assert sent["stream"] is True


@pytest.mark.parametrize("seed", [-1, 0xFFFFFFFF, (1 << 64) - 1, -(1 << 63), 1 << 32])
def test_every_seed_is_a_fixed_one(seed: int) -> None:
    """W11: no seed turns into the number that means a random one."""
    assert 0 <= body(seed=seed)["seed"] < 0xFFFFFFFF


def test_a_schema_becomes_a_grammar_or_an_error() -> None:
    """W11, Issue 11.4: a format that cannot be enforced is refused; the spacing is ours."""
    assert '"type": "object"' in body(schema={"type": "object"})["grammar"]
    assert body(schema={})["grammar"]
    with pytest.raises(InvalidRequest, match="/format in the JSON schema is 'x'") as caught:
        body(schema={"type": "string", "format": "x"})
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"type": "exceed_context_size_error", "message": "x"}, ContextOverflow),
        ({"type": "invalid_request_error", "message": "x"}, InvalidRequest),
        ({"type": "server_error", "message": "failed to allocate Memory"}, OutOfMemory),
        ({"type": "server_error", "message": "x"}, GenerationFailed),
        ({}, GenerationFailed),
    ],
)
def test_errors_are_translated(error: dict[str, Any], kind: type[Exception]) -> None:
    """W17: the library's errors become typed ones."""
    assert type(error_from(error)) is kind


class Server:
    """Plays chunks as the library would: it calls back until it is told to stop."""

    def __init__(self, *chunks: dict[str, Any] | bytes) -> None:
        self.chunks = chunks
        self.played = 0

    def handle_completions(self, body: bytes, on_chunk: Any) -> None:
        for chunk in self.chunks:
            self.played += 1
            raw = chunk if isinstance(chunk, bytes) else msgspec.json.encode(chunk)
            if on_chunk(raw):
                return


def played(server: Server, stop: bool = False, **sampling: Any) -> list[RawEvent]:
    events: list[RawEvent] = []

    def emit(event: RawEvent) -> bool:
        events.append(event)
        return stop

    request = EngineRequest(token_ids=(1, 2), max_tokens=9, sampling=Sampling(**sampling))
    call = Call(request, emit, lambda text: tuple(text.encode()))
    call.run(server)  # pyright: ignore[reportArgumentType]
    return events


def token(number: int, text: str) -> dict[str, Any]:
    return {"choices": [{"text": text}], "__verbose": {"tokens": [number]}}


END = {
    "choices": [{"text": "", "finish_reason": "length"}],
    "usage": {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    },
}
PROGRESS = {"prompt_progress": {"total": 2, "cache": 1, "processed": 2}}


def test_chunks_become_events() -> None:
    """W15: usage is the engine's own account."""
    assert played(Server(PROGRESS, token(5, "a"), END)) == [
        Admitted(2, 2, 1),
        RawDelta(b"a", (5,)),
        RawFinish(reason="length", prompt_tokens=2, completion_tokens=3, cached_tokens=1),
    ]


def test_a_stop_token_ends_the_call_with_a_count_of_its_own() -> None:
    """W11, W15: stop_token_ids are not the engine's; the tokens before are counted."""
    server = Server(PROGRESS, token(5, "a"), token(6, "b"), token(7, "c"))
    assert played(server, stop_token_ids=(6,))[-1] == RawFinish(
        reason="stop", prompt_tokens=2, completion_tokens=1, cached_tokens=1
    )
    assert server.played == 3


def test_a_character_of_several_tokens_has_all_of_their_ids() -> None:
    """W19: the library names the last one only; where the others cannot be told, none is made up.

    The tokens here are bytes.
    """

    def made(number: int, text: str, so_far: int) -> dict[str, Any]:
        chunk = token(number, text)
        chunk["__verbose"]["tokens_predicted"] = so_far
        return chunk

    chunks = (made(97, "a", 1), made(0x8D, " 🌍", 5), made(0x8D, "🌍", 9), made(98, "b", 10))
    ids = [event.token_ids for event in played(Server(*chunks, END)) if isinstance(event, RawDelta)]
    assert ids == [(97,), (0xF0, 0x9F, 0x8C, 0x8D), (0xF0, 0x9F, 0x8C, 0x8D), (98,)]
    strange = (made(7, "🌍", 4), made(0x8D, "🌍", 10), made(98, "b", 11))
    ids = [
        event.token_ids for event in played(Server(*strange, END)) if isinstance(event, RawDelta)
    ]
    assert ids == [(7,), (0x8D,), (98,)]


def test_logprobs_keep_what_json_cannot_say() -> None:
    """W11: an impossible token has a very low logprob, and only as many as asked for are kept."""
    candidate = {"id": 6, "bytes": [98], "logprob": None}
    chosen = {"id": 5, "bytes": [97], "logprob": -0.5, "top_logprobs": [candidate, candidate]}
    chunk = token(5, "a")
    chunk["choices"][0]["logprobs"] = {"content": [chosen]}
    delta = played(Server(chunk, END), logprobs=1)[0]
    assert isinstance(delta, RawDelta)
    assert delta.logprobs == (TokenLogprob(5, b"a", -0.5, (TopLogprob(6, b"b", -9999.0),)),)


def test_nobody_listening_stops_the_library_at_the_next_chunk() -> None:
    """W18: progress chunks count too, so a prefill can be left."""
    server = Server(PROGRESS, token(5, "a"))
    assert played(server, stop=True) == [Admitted(2, 2, 1)]
    assert server.played == 1


@pytest.mark.parametrize(
    ("chunk", "kind"),
    [
        ({"error": {"type": "server_error", "message": "x"}}, GenerationFailed),
        (b"not json", msgspec.DecodeError),
    ],
)
def test_a_failure_in_the_callback_is_carried_over(
    chunk: dict[str, Any] | bytes, kind: type[Exception]
) -> None:
    """W19: the library swallows exceptions of the callback; the stream does not."""
    with pytest.raises(kind):
        played(Server(token(5, "a"), chunk, token(6, "b")))


def test_an_end_without_a_reason_is_an_error() -> None:
    """W14: a reason is never invented."""
    with pytest.raises(GenerationFailed, match="without a reason"):
        played(Server(token(5, "a")))
