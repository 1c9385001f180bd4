"""Issue 17.3: drafts, as options of the engines, on small real models, and in the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.fakes.llama_server import install
from tests.models.builders import ARRAY, STRING, gguf, with_pairs
from tests.service.serving import served
from tests.tiny_gguf import tiny_gguf
from tests.worker.rig import ask, finish, listed, worker

from headrace import AsyncModelWorker, engines, runtime
from headrace.core.errors import ConfigError, UnknownModel
from headrace.core.model import ModelFile, ModelSpec
from headrace.core.sampling import Sampling
from headrace.engines import llamacpp, vllm
from headrace.engines.base import EngineRequest, OpenRequest, RawDelta, RawDraft, RawEvent
from headrace.engines.llama_server.engine import Engine as Served
from headrace.engines.llamacpp.engine import Engine as InProcess
from headrace.engines.speculation import SpeculationOptions, check_draft
from headrace.engines.vllm.call import honoured
from headrace.models.inspect import inspect

NGRAM = {"speculation": "ngram", "draft_tokens": 1}
DRAFT = {"speculation": "draft", "draft_model": "tiny.gguf"}
REQUEST = EngineRequest(
    token_ids=tuple(range(40, 60)) * 4,
    max_tokens=24,
    # A model of random weights repeats nothing by itself.
    sampling=Sampling(temperature=0, ignore_eos=True, logit_bias={41: 100.0}),
)


@pytest.fixture(scope="module")
def tiny(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """A model of one layer."""
    return inspect(tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", smollm2_path))


def opening(model: ModelFile, draft: ModelFile | None = None, **options: Any) -> OpenRequest:
    options = {"slots": 1, "threads": 1, "kv_type": "bf16", "flash_attention": "on"} | options
    return OpenRequest(model=model, draft=draft, context_length=256, options=options)


def answer(events: Sequence[RawEvent]) -> tuple[int, ...]:
    deltas = (event for event in events if isinstance(event, RawDelta))
    return tuple(token for delta in deltas for token in delta.token_ids)


async def answered(engine: Served | InProcess, request: EngineRequest) -> list[RawEvent]:
    """Return the events of a request, and close the engine."""
    try:
        return [event async for event in engine.generate(request)]
    finally:
        engine.close()


def drafts(events: Sequence[RawEvent]) -> tuple[int, int]:
    """How many tokens were drafted, and accepted."""
    found = [event for event in events if isinstance(event, RawDraft)]
    return sum(event.drafted for event in found), sum(event.accepted for event in found)


async def test_a_draft_model_and_ngrams_keep_the_text(tiny: ModelFile, tmp_path: Path) -> None:
    """Issue 17.3: on llamacpp and llama_server; the model is its own draft."""
    executable = {"executable": str(install(tmp_path))}
    plain = msgspec.structs.replace(REQUEST, sampling=Sampling(temperature=0, ignore_eos=True))
    expected = [
        answer(await answered(InProcess(opening(tiny)), request)) for request in (plain, REQUEST)
    ]
    for kind, options, draft in (
        (InProcess, NGRAM, None),
        (InProcess, DRAFT, tiny),
        (Served, NGRAM | executable, None),
        (Served, DRAFT | executable, tiny),
    ):
        engine, request = kind(opening(tiny, draft, **options)), plain if draft else REQUEST
        events = await answered(engine, request)
        drafted, accepted = drafts(events)
        assert answer(events) == expected[draft is None], (kind, options)
        assert 0 < accepted <= drafted, (kind, options)
        assert engine.facts.capabilities.speculation == options["speculation"]


async def test_log_probabilities_of_accepted_tokens(tiny: ModelFile) -> None:
    """Issue 17.3: the library reports 0 for them, and no candidates; ours are those without."""
    request = msgspec.structs.replace(
        REQUEST, sampling=msgspec.structs.replace(REQUEST.sampling, logprobs=2), max_tokens=12
    )
    reports: list[list[Any]] = []
    for options in ({}, NGRAM):
        events = await answered(InProcess(opening(tiny, **options)), request)
        assert bool(drafts(events)[1]) == bool(options)
        deltas = (event for event in events if isinstance(event, RawDelta))
        reports.append([entry for delta in deltas for entry in delta.logprobs])
    plain, drafted = reports
    assert len(plain) == len(drafted) == 12
    for mine, its in zip(plain, drafted, strict=True):
        assert (mine.token_id, len(mine.top)) == (its.token_id, len(its.top))
        assert its.logprob == pytest.approx(mine.logprob, abs=0.02)


@pytest.mark.parametrize(
    ("engine", "options", "problem"),
    [
        ("echo", {"speculation": "draft"}, "draft is not among off, auto, ngram"),
        ("echo", {"speculation": "auto", "draft_model": "x"}, "the engine takes none"),
        ("llamacpp", {"speculation": "mtp"}, "mtp is not among off, auto, ngram, draft"),
        (
            "llamacpp",
            {"speculation": "draft"},
            "An option of engine llamacpp: speculation draft needs a draft_model",
        ),
        ("llamacpp", {"draft_model": "x"}, "speculation off uses no draft_model"),
        ("llamacpp", {"draft_tokens": 65}, "draft_tokens"),
        ("sentence_transformers", NGRAM, "speculation"),
    ],
)
def test_what_an_engine_cannot_is_refused(
    engine: str, options: dict[str, Any], problem: str
) -> None:
    """Issue 17.3: by the name of the option, before anything is loaded."""
    with pytest.raises(ConfigError) as caught:
        engines.check_options(engine, options)
    assert problem in caught.value.message


def test_vllm_claims_no_parameter_that_it_ignores_with_drafts() -> None:
    """Issue 17.3: seen with vLLM 0.26 on a GPU, which says so in its log."""
    assert honoured(drafts=False) - honoured(drafts=True) == {"min_p", "logit_bias"}


def test_both_options_are_arguments() -> None:
    """Issue 17.3: the configuration looks at one option at a time; in any order."""
    for options in (DRAFT, dict(reversed(DRAFT.items()))):
        worker = AsyncModelWorker("echo", engine="llamacpp", options=options)
        assert worker.spec.options == DRAFT


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        (
            {"speculation": "ngram", "draft_tokens": 5},
            {"method": "ngram", "num_speculative_tokens": 5}
            | {"prompt_lookup_min": 2, "prompt_lookup_max": 4},
        ),
        ({"speculation": "mtp"}, {"method": "mtp", "num_speculative_tokens": 4}),
        (
            {"speculation": "auto", "draft_model": "x"},
            {"method": "draft_model", "num_speculative_tokens": 4, "model": "/draft"},
        ),
        (
            {"speculation": "eagle3", "draft_model": "x", "draft_tokens": 2},
            {"method": "eagle3", "num_speculative_tokens": 2, "model": "/draft"},
        ),
    ],
)
def test_vllm_is_given_its_own_names(options: dict[str, Any], config: dict[str, Any]) -> None:
    """Issue 17.3: `speculative_config`, as vLLM 0.26 reads it."""
    model = ModelFile(path="/model", format="safetensors")
    draft = ModelFile(path="/draft", format="safetensors") if "draft_model" in options else None
    request = OpenRequest(model=model, draft=draft, options=options)
    made = vllm.speculative_config(request, vllm.Options(**options))
    assert made.get("speculative_config", {}) == config


def test_the_way_and_the_length_of_drafts() -> None:
    """Issue 17.3: `auto` is a draft model where there is one; off drafts nothing."""

    def settled(**options: Any) -> SpeculationOptions:
        return SpeculationOptions(**options)

    auto = settled(speculation="auto")
    assert (auto.way, auto.drafts, auto.most_drafted) == ("ngram", True, 16)
    auto = settled(speculation="auto", draft_model="x")
    assert (auto.way, auto.most_drafted) == ("draft", 4)
    assert settled(draft_tokens=9).most_drafted == 0


def test_the_length_of_n_grams_of_llamacpp() -> None:
    """Issue 17.3: no more tokens are looked up than drafted, as the library drafts as many."""

    def lengths(**options: Any) -> tuple[int, int]:
        settled = llamacpp.Options(speculation="ngram", **options)
        return llamacpp.looked_up(settled), settled.most_drafted

    assert (lengths(), lengths(draft_tokens=3), lengths(draft_tokens=8)) == ((5, 5), (3, 3), (5, 8))


def test_a_batch_has_room_for_all_drafts() -> None:
    """The library ends the process where the tokens of all slots exceed a batch."""

    def size(slots: int, **options: Any) -> int:
        return llamacpp.batch_size(llamacpp.Options(**options), slots, on_cpu=True)

    assert size(32, speculation="ngram", draft_tokens=16) == 32 * 17
    assert size(4, speculation="ngram", draft_tokens=16) == 128
    assert size(200) == 200


def test_the_draft_model_is_in_the_estimate(tiny: ModelFile) -> None:
    """Issue 17.3: its weights and its cache, for the ledger."""
    without = llamacpp.footprint(opening(tiny))
    need = llamacpp.footprint(opening(tiny, tiny, **DRAFT))
    more = need.devices["cpu"] - without.devices["cpu"]
    assert need.parts["draft"] == more > tiny.size + 256 * (tiny.kv_bytes_per_token or 0)


def test_a_draft_model_with_other_tokens_is_refused(tmp_path: Path, tiny: ModelFile) -> None:
    """Issue 17.3: with the reason, before the load."""

    def made(name: str, **changes: Any) -> ModelFile:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(gguf(with_pairs(**changes)))
        return inspect(path)

    tokens = [f"token{n}" for n in range(50)]
    key = "tokenizer.ggml.tokens"
    model = made("model")
    check_draft(model, made("same"))
    other = [*tokens[:7], "word", *tokens[8:]]
    few = made("few", tokenizer__ggml__tokens=(key, ARRAY, (STRING, [f"t{n}" for n in range(500)])))
    for draft, problem in (
        (made("word", tokenizer__ggml__tokens=(key, ARRAY, (STRING, other))), "token 7 is b'word'"),
        (few, "it has 500 tokens, and the model 50"),
        (tiny, "its tokenizer is gpt2, and that of the model None"),
        (msgspec.structs.replace(model, special_ids={}), "its bos_token is None"),
        (msgspec.structs.replace(model, task="embed"), "it is made to embed"),
        (msgspec.structs.replace(model, format="safetensors"), "its format is safetensors"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_draft(model, draft)
        assert problem in caught.value.message
        assert caught.value.param == "options.draft_model"


def test_the_draft_model_is_resolved_like_the_model(tiny: ModelFile, tmp_path: Path) -> None:
    """Issue 17.3: `pull` and a load get it by its reference."""
    settings = runtime.load_settings(environ={"HEADRACE_HOME": str(tmp_path)})
    options = {"speculation": "draft", "draft_model": tiny.path}
    spec = ModelSpec(name="m", model=tiny.path, engine="llamacpp", options=options)
    resolved = runtime.resolver(settings.config)(spec, lambda *_: None)
    assert resolved.draft == tiny
    missing = msgspec.structs.replace(spec, options={**options, "draft_model": f"{tiny.path}.no"})
    with pytest.raises(UnknownModel, match=r"tiny\.gguf\.no"):
        runtime.resolver(settings.config)(missing, lambda *_: None)


async def test_the_figures_of_drafts() -> None:
    """Issue 17.3: also of an answer that a stop string ends, before the engine has finished."""
    async with worker(speculation="ngram", draft_tokens=3) as model:
        usage = finish(await listed(model.ask(ask("abcdefgh", max_tokens=8)))).usage
        assert (usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens) == (8, 6, 6)
        usage = finish(await listed(model.ask(ask("abcdefgh", stop=("e",))))).usage
        assert usage.drafted_tokens == 6
        assert usage.accepted_tokens <= usage.completion_tokens


def test_over_http(tmp_path: Path) -> None:
    """Issue 17.3: in OpenAI's usage, the figures, the metrics and the abilities of the model."""
    with served("echo", "--option", "speculation=ngram") as service:
        body = {"model": "echo", "prompt": "a river and a river", "max_tokens": 12}
        reply = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json()
        details = reply["usage"]["completion_tokens_details"]
        figures = reply["metrics"]["usage"]
        metrics = httpx.get(f"{service.url}/metrics", timeout=60).text
    counts = (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"])
    assert counts == (10, 6)
    assert (figures["drafted_tokens"], figures["accepted_tokens"]) == (16, 10)
    assert 'headrace_drafted_tokens_total{model="echo"} 16.0' in metrics
    assert 'headrace_accepted_tokens_total{model="echo"} 10.0' in metrics
