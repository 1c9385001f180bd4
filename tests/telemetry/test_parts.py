"""The small parts: headers, redaction, and what switches OpenTelemetry on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.pictures_made import asked, png

from headrace.cli import trace
from headrace.core.install import install_command
from headrace.core.metrics import Gaps, InferenceMetrics
from headrace.core.request import GenerateRequest
from headrace.core.sampling import Sampling, SamplingFields, described
from headrace.telemetry import names, otel
from headrace.telemetry.content import REDACTED, Redactor, attributes, content, parameters
from headrace.telemetry.spans import Parent

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_traceparent_is_read_and_written() -> None:
    """T1: as the W3C has it; what a later version adds is passed over."""
    parent = Parent.parse(GOOD, "a=1,b=2")
    assert parent is not None
    assert parent.traceparent == GOOD
    assert parent.state == "a=1,b=2"
    assert Parent.parse("cc" + GOOD[2:] + "-more") == parent._replace(state="")
    assert Parent.parse(GOOD, "x" * 600) == parent._replace(state="")


@pytest.mark.parametrize(
    "header",
    [
        "",
        GOOD.upper(),
        GOOD + "-more",
        "ff" + GOOD[2:],
        GOOD[:-1],
        GOOD.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        GOOD.replace("b7ad6b7169203331", "0" * 16),
        GOOD.replace("-01", "-zz"),
        "\u0660" + GOOD[1:],
    ],
)
def test_what_is_no_traceparent_is_as_if_it_were_not_there(header: str) -> None:
    assert Parent.parse(header) is None


@given(st.text(max_size=80), st.text(max_size=80))
def test_no_header_is_too_strange(header: str, state: str) -> None:
    for one in (header, GOOD):
        parent = Parent.parse(one, state)
        assert parent is None or Parent.parse(parent.traceparent) is not None


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("key sk-proj-Abc_123456789012345 end", f"key {REDACTED} end"),
        ("hf_abcdefghijklmnopqrstuv", REDACTED),
        ("AKIAABCDEFGHIJKLMNOP", REDACTED),
        ("Authorization: Bearer abc.def-123456", f"Authorization: {REDACTED}"),
        ("my password = hunter2, yes", f"my {REDACTED}, yes"),
        ("My password is hunter2. Yes.", f"My {REDACTED} Yes."),
        ("the secret is to stir", "the secret is to stir"),
        ('{"api_key": "x y z"}', f'{{"{REDACTED}}}'),
        ("ask jo.doe+x@mail.example.org now", f"ask {REDACTED} now"),
        ("card 4111 1111 1111 1111.", f"card {REDACTED}."),
        ("number 4111 1111 1111 1112.", "number 4111 1111 1111 1112."),
        ("pi is 3.14159265358979323846", "pi is 3.14159265358979323846"),
        ("a skeleton key, and a bearer of news", "a skeleton key, and a bearer of news"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", REDACTED),
    ],
)
def test_what_is_redacted(text: str, left: str) -> None:
    """T3: and what is not."""
    assert Redactor().redact(text) == left


def test_ones_own_patterns_are_redacted_too() -> None:
    assert Redactor([r"project \w+"]).redact("In project Falcon.") == f"In {REDACTED}."


def test_of_an_image_only_its_size_and_digest_are_kept() -> None:
    """Issue 13, pictures: neither the record nor the spans have the bytes."""
    request = asked("My key is sk-0123456789abcdef0123", png(), "?")
    kept = content(request, {0: ["Red."]}, Redactor())
    (turn,) = kept.input
    assert turn["content"][0] == f"My key is {REDACTED}"
    assert turn["content"][1] == {
        "type": "image",
        "digest": hashlib.sha256(png()).hexdigest(),
        "format": "png",
        "size": len(png()),
        "width": 64,
        "height": 48,
        "place": "messages[0].content[1]",
    }
    sent = json.loads(str(attributes(request, kept, ["stop"])[names.INPUT_MESSAGES]))
    assert [part["type"] for part in sent[0]["parts"]] == ["text", "image", "text"]
    assert "media" not in parameters(request, Redactor())
    assert "[png 64x48, 9." in trace.content(msgspec.to_builtins(kept.input))


def test_redaction_takes_no_longer_than_the_text_is_long() -> None:
    hard = ("a" * 70 + ".") * 2000 + "@" + "1 " * 50_000 + "-----BEGIN PRIVATE KEY-----" * 200
    began = time.perf_counter()
    Redactor().redact(hard)
    assert time.perf_counter() - began < 5


def test_given_sampling_parameters_are_attributes() -> None:
    """T3: each scalar, under the conventions' name where they have one."""
    given: dict[str, Any] = {
        name: 2**64 - 1 if name == "seed" else (1 if plain is int else 0.5)
        for name, (plain, _) in described(SamplingFields).items()
    }
    request = GenerateRequest(prompt="x", sampling=Sampling(**given))
    attributes = names.request_attributes(request, "p")
    ours = {f"headrace.request.{name}" for name in ("min_p", "min_tokens", "repetition_penalty")}
    assert ours < {f"headrace.request.{name}" for name in given}
    assert {name for name in attributes if name.startswith("headrace.")} == ours
    for name in given:
        assert (f"gen_ai.request.{name}" in attributes) == (f"headrace.request.{name}" not in ours)
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.request.seed"] == str(2**64 - 1), "more than 64 bits with a sign"
    bare = names.request_attributes(GenerateRequest(prompt="x"), "p")
    assert bare.keys() == {names.OPERATION, names.PROVIDER, "gen_ai.output.type"}


def test_scalar_figures_are_attributes() -> None:
    """T3: all that are defined, but those that the span or a convention has."""
    figures: dict[str, Any] = {
        name: 1 for name in InferenceMetrics.declared() if name not in {"usage", "devices"}
    }
    metrics = InferenceMetrics(**{**figures, "inter_token_ms": Gaps(p50=1, p99=2, max=3)})
    assert names.figures(metrics).keys() == {
        f"headrace.{name}"
        for name in (
            *(
                "queue_ms",
                "load_ms",
                "compile_ms",
                "time_to_first_content_ms",
                "prefill_ms",
                "prefill_tokens_per_second",
            ),
            *("time_per_output_token_ms", "decode_tokens_per_second", "chunks"),
            *(
                "tool_calls",
                "continuations",
                "continued",
                "inter_token_p50_ms",
                "inter_token_p99_ms",
            ),
        )
    }
    bare = names.figures(InferenceMetrics(started_at=1.0))
    counts = ("chunks", "tool_calls", "continuations")
    assert bare == {"headrace.load_ms": 0.0} | {f"headrace.{name}": 0 for name in counts}


def test_nothing_is_imported_where_nothing_is_asked_for() -> None:
    """T2: off costs nothing."""
    code = (
        "import sys; from headrace.telemetry import otel, recorder;"
        "t = otel.configure('1', {'OTEL_SERVICE_NAME': 'x'});"
        "print(t.exporter, [name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None []"


_URL = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("environment", "by"),
    [
        ({}, None),
        ({"OTEL_TRACES_EXPORTER": " ", "OTEL_SERVICE_NAME": "x"}, None),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_TRACES_EXPORTER": "OTLP, none"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": _URL}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": _URL}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        (
            {"OTEL_TRACES_EXPORTER": "console", "OTEL_EXPORTER_OTLP_ENDPOINT": _URL},
            "OTEL_TRACES_EXPORTER",
        ),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": _URL}, None),
        ({"OTEL_TRACES_EXPORTER": "None", "OTEL_EXPORTER_OTLP_ENDPOINT": _URL}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": _URL}, None),
    ],
)
def test_which_variable_switches_it_on(environment: dict[str, str], by: str | None) -> None:
    """T2: and the very variables do."""
    assert otel.switched_on_by(environment) == by
    tracing = otel.configure("1", environment)
    assert (tracing.exporter is None) == (by is None)
    asyncio.run(tracing.aclose())


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_EXPORTER": "nonsense"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"},
    ],
)
def test_a_wrong_variable_keeps_no_service_from_starting(environment: dict[str, str]) -> None:
    """T2: it is told in the log."""
    assert otel.configure("1", environment).exporter is None


def test_the_sdk_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T2: one line that says what to install."""
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    tracing = otel.configure("1", {"OTEL_TRACES_EXPORTER": "otlp"})
    assert tracing.exporter is None
    (line,) = caplog.records
    assert install_command("otlp") in line.getMessage()


def test_the_provider_of_the_host_program_is_used() -> None:
    """T2: in a process of its own, as a provider can be set once."""
    code = (
        "from opentelemetry import trace; from opentelemetry.sdk.trace import TracerProvider;"
        "trace.set_tracer_provider(TracerProvider());"
        "from headrace.telemetry import otel; print(otel.configure('1', {}).exporter is None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_closing_twice_is_closing_once() -> None:
    tracing = otel.configure("1", {"OTEL_TRACES_EXPORTER": "otlp"})
    assert tracing.exporter is not None
    asyncio.run(tracing.aclose())
    asyncio.run(tracing.aclose())
