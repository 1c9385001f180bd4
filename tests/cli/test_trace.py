"""What `headrace trace` tells of records that a service has left, and how it asks again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.pictures_made import data_url, png
from tests.service.serving import Service, served
from tests.sounds_made import spoken, wav
from tests.telemetry.traced import metrics, record, spans

from headrace.cli.app import run
from headrace.core.metrics import Usage
from headrace.core.record import Content, RequestRecord
from headrace.telemetry import trace_read
from headrace.telemetry.trace_file import TraceFile

HOUR = 3600
QUESTION = [{"role": "user", "content": "good morning"}]
MODELS = """
[telemetry]
trace_content = true
[models.small]
model = "builtin:echo"
[models.seeing]
model = "builtin:echo"
options = {images = true, audio = true}
[models.other]
model = "builtin:echo"
options = {text = "good evening"}
[models.broken]
model = "builtin:echo"
options = {fail_after = 3}
"""


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two hours east of Greenwich."""
    monkeypatch.setenv("TZ", "EET-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def keep(home: Path, *given: RequestRecord) -> None:
    traces = TraceFile(home / "traces", 1 << 20)
    for one in given:
        traces.record(one)
    traces.close(30)


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[str]:
    """The lines that a command prints; where it fails, those of the error."""
    assert run(["trace", *arguments]) == code
    captured = capsys.readouterr()
    return (captured.err if code else captured.out).splitlines()


LOST = record(
    2,
    model="big",
    outcome="error",
    error="WorkerDied",
    message="The worker died by SIGKILL.",
    client="",
    finish_reasons=(),
    metrics=metrics(2, time_to_first_token_ms=None, decode_tokens_per_second=None, total_ms=75321),
)


@pytest.mark.usefixtures("zone")
def test_that_requests_are_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T4: one line each, the newest first, in local time."""
    keep(home, record(1, id="ab" * 12), LOST, record(3, id="cd" * 12 + ".1"))
    assert told(capsys, "ls") == [
        "ID                          TIME            MODEL  KEY       TOKENS"
        "   TTFT  TOK/S   TOTAL  STATUS",
        "cdcdcdcdcdcdcdcdcdcdcdcd.1  11-15 00:13:23  small  5e884898   12+45"
        "  30 ms  166.7  300 ms  ok",
        f"{LOST.id[:12]}                11-15 00:13:22  big    -          12+45"
        "      -      -  75.3 s  error WorkerDied",
        "abababababab                11-15 00:13:21  small  5e884898   12+45"
        "  10 ms  500.0  100 ms  ok",
    ]
    assert len(told(capsys, "ls", "--limit", "2")) == 3
    [body] = json.loads("".join(told(capsys, "ls", "--json", "--status", "error")))
    assert body["message"] == "The worker died by SIGKILL."


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ((), 5),
        (("--since", "90m"), 2),
        (("--until", "90m"), 3),
        (("--since", "2023-11-15T00:13:23"), 3),
        (("--since", "2023-11-15T00:13:23+00:00"), 2),
        (("--until", "2023-11-15"), 0),
        (("--model", "small", "--slower-than", "0.25s"), 3),
        (("--status", "error"), 1),
        (("--key", "5e"), 4),
    ],
)
def test_that_filters_are_read(
    home: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], found: int
) -> None:
    """T4: by time (ago, local, or of a zone), model, status, slowness and key."""
    now = time.time()
    late = [record(n, time=now - (4.5 - n) * HOUR / 1.5) for n in (3, 4)]
    keep(home, record(1), LOST, record(5), *late)
    assert len(json.loads("".join(told(capsys, "ls", "--json", *flags)))) == found
    summed = json.loads("".join(told(capsys, "stats", "--json", *flags)))
    assert sum(one["requests"] for one in summed) == found


@pytest.mark.usefixtures("zone")
def test_that_all_is_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "system", "content": "Echo."}, *QUESTION]
    content = Content(input=turns, answered=("Hm.\n\x1b]0;mine\x07", "Two."))
    usage = Usage(prompt_tokens=12, completion_tokens=45, reasoning_tokens=9)
    one = record(7, content=content, metrics=metrics(7, usage=usage, load_ms=1234.5))
    keep(home, one, LOST)
    shown = "\n".join(told(capsys, "show", one.id[:8]))
    for line in (
        f"id             {one.id}",
        "time           2023-11-15 00:13:27.000+02:00",
        "completion     45 tokens",
        "reasoning      9 tokens of it",
        "load           1.23 s",
        "per token      14 ms, 71.4 tokens/s",
        "gaps           p50 2 ms, p99 3.5 ms, max 4.25 ms",
        "cpu            memory 149.0 MB, peak 151.0 MB",
        "  temperature  0.0",
        '  stop         ["\\n\\n"]',
    ):
        assert f"\n{line}\n" in f"\n{shown}\n"
    assert shown.endswith(
        "\n\nasked\nsystem: Echo.\nuser: good morning\n\nanswered\nHm.\n]0;mine\n\nanswered\nTwo."
    )
    body = json.loads("".join(told(capsys, "show", "--json", one.id)))
    assert body["content"]["answered"][1] == "Two."
    lost = told(capsys, "show", LOST.id)
    assert "message        The worker died by SIGKILL." in lost
    assert not any(line.startswith(("ttft", "key", "asked")) for line in lost)


def test_that_steps_are_drawn(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T4: each below its parent, as wide as it was long, in the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "72")
    keep(home, record(1), LOST, record(9, spans=()))
    bars = "█"
    assert told(capsys, "tree", record(1).id) == [
        f"chat small   100 ms   {bars * 50}",
        f"  queue       10 ms   {bars * 5}",
        f"  generate    90 ms   {' ' * 5}{bars * 45}",
        f"    prefill   30 ms   {' ' * 5}{bars * 15}",
        f"    decode    60 ms   {' ' * 20}{bars * 30}",
    ]
    deeper = told(capsys, "tree", "-v", record(1).id)
    assert deeper[1:3] == ["  gen_ai.request.model=small", "  tokens=45"]
    assert [
        one["name"] for one in json.loads("".join(told(capsys, "tree", "--json", LOST.id)))
    ] == [one.name for one in spans()]
    assert told(capsys, "tree", record(9).id) == []


def test_that_broken_steps_are_drawn_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caller's parent is not among them; nothing takes time; one has failed."""
    root, first, *_ = (
        type(one)(
            name=one.name, span_id=one.span_id, parent_id="ff" * 8, start_ms=0, ms=0, failed=True
        )
        for one in spans()
    )
    keep(home, record(1, spans=(root, first)))
    assert told(capsys, "tree", record(1).id) == ["chat small  0 ms ! █", "generate    0 ms ! █"]


def test_that_requests_are_summed_up(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(home, *map(record, range(1, 11)), LOST)
    lines = told(capsys, "stats")
    assert lines[:4] == [
        "MODEL  REQUESTS  OK  REFUSED  ERROR  CANCELLED  PROMPT  COMPLETION",
        "big           1   0        0      1          0      12          45",
        "small        10  10        0      0          0     120         450",
        "",
    ]
    assert "small  ttft          10   50 ms   90 ms  100 ms" in lines
    assert "small  tokens/s      10    83.3   250.0   500.0" in lines


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("show", "ff"), "No trace of 'ff' is kept in"),
        (("ls", "--since", "yesterday"), "--since 'yesterday' is no time: write 1h30m"),
        (("ls", "--slower-than", "soon"), "--slower-than: 'soon' is not a duration"),
        (("stats", "--status", "odd"), "Invalid value for '--status'"),
    ],
)
def test_that_mistakes_are_told(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    [line] = told(capsys, *arguments, code=2)
    assert why in line


def test_that_nothing_is_no_mistake(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads("".join(told(capsys, "ls", "--json"))) == []
    assert run(["trace", "ls"]) == 0
    assert f"No such request is kept in {home / 'traces'}." in capsys.readouterr().err


@pytest.fixture(scope="module")
def served_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def service(served_home: Path) -> Iterator[Service]:
    config = served_home / "headrace.toml"
    config.write_text(MODELS)
    with served("--config", str(config), environment={"HOME": str(served_home)}) as it:
        yield it


def asked(number: int = 1, **fields: Any) -> RequestRecord:
    content = Content(input=QUESTION, answered=("good morning",))
    return record(number, **{"content": content, **fields})


def test_that_a_request_is_asked_again(
    service: Service, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T4: the same question with the same parameters, to the same model or another."""
    keep(home, asked())
    assert run(["trace", "replay", asked().id, "--url", service.url]) == 0
    captured = capsys.readouterr()
    assert captured.out == "good morning\n"
    heads, *rows, verdict = captured.err.splitlines()
    then_now = {line.split()[0]: line.split()[1:] for line in rows}
    assert heads.split() == ["FIGURE", "THEN", "NOW"]
    assert then_now["model"] == ["small", "small"]
    assert then_now["ttft"][:2] == ["10", "ms"]
    assert then_now["finish"] == ["stop", "stop"]
    assert then_now["tokens"][0] == "12+45"
    assert verdict == "The text is equal."
    hidden = [{"role": "user", "content": "[redacted]"}]
    keep(home, asked(2, content=Content(input=hidden, answered=("a secret",))))
    assert run(["trace", "replay", asked(2).id, "--url", service.url]) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "The text is another from character 0 on.",
        "The request is not quite the same: parts of the record are redacted.",
    ]
    again = ["trace", "replay", asked().id, "--model", "other", "--url", service.url]
    assert run([*again, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["model"] == "other"
    assert body["answered"] == ["good evening"]
    assert (body["equal"], body["differs_at"]) == (False, len("good "))
    assert body["metrics"]["usage"]["completion_tokens"] == len("good evening") + 1


def test_that_parameters_and_choices_are_sent_again(
    service: Service, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = {"max_tokens": 4, "n": 2, "logprobs": 1, "seed": 7}
    chat = asked(1, parameters=parameters, content=Content(input=QUESTION, answered=("good",)))
    prompt = asked(
        2,
        operation="text_completion",
        content=Content(input="one two three", answered=("one two th",)),
        parameters={"max_tokens": 40, "stop": ["ree"], "logprobs": 0},
    )
    keep(home, chat, prompt)
    assert run(["trace", "replay", chat.id, "--url", service.url]) == 0
    captured = capsys.readouterr()
    assert captured.out == "good\n\n2: good\n"
    assert "length, length" in captured.err
    assert captured.err.endswith("\nThe text is another.\n")
    assert run(["trace", "replay", prompt.id, "--url", service.url, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["answered"], body["finish_reasons"]) == (["one two th"], ["stop"])
    assert body["equal"] is True


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city; write to me@example.org.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def custom(name: str, description: str | None, syntax: str, definition: str) -> dict[str, Any]:
    grammar = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    tool = {"name": name, "description": description, "format": grammar}
    return {"type": "custom", "custom": tool}


TURNS = [
    {"role": "user", "content": "And tomorrow?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


@pytest.fixture
def answered(
    service: Service, served_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any], str], RequestRecord]:
    """Makes a request of the service, and returns its record."""
    monkeypatch.setenv("HEADRACE_HOME", str(served_home))

    def ask(body: dict[str, Any], path: str = "/v1/chat/completions") -> RequestRecord:
        reply = httpx.post(service.url + path, json={"model": "small", **body}, timeout=20)
        assert reply.status_code == 200, reply.text
        name, end = reply.json()["id"].rpartition("-")[2], time.monotonic() + 20
        while True:
            kept = list(trace_read.records(served_home / "traces"))
            if matching := [it for it in kept if it.id == name]:
                return matching[0]
            assert time.monotonic() < end
            time.sleep(0.02)

    return ask


def test_that_tools_thinking_and_forms_are_sent_again(
    service: Service,
    answered: Callable[..., RequestRecord],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue 13: a request with tools, calls, their results and thinking is replayed as it was."""
    body = {
        "messages": [*TURNS, {"role": "user", "content": CALL}],
        "tools": [
            WEATHER,
            {"type": "function", "function": {"name": "time", "strict": True}},
            custom("plate", "Of a car.", "regex", "[A-Z]{2}"),
            custom("patch", None, "lark", 'start: "a"'),
        ],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [WEATHER]},
        },
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "thinking_token_budget": 7,
        "reasoning_format": "hidden",
        "chat_template_kwargs": {"greeting": "hi"},
    }
    first = answered(body)
    assert first.metrics.tool_calls == 1
    assert first.spans[0].attributes["headrace.tool_calls"] == 1
    assert first.content is not None
    assert first.content.answered == ('\nweather {"city": "Paris"}',)
    assert [tool.get("input") for tool in first.content.tools] == [
        *(None, None),
        *({"regex": "[A-Z]{2}"}, {"grammar": 'start: "a"'}),
    ]
    assert first.content.tools[0]["description"] == "Of a city; write to [redacted]."
    assert run(["trace", "replay", first.id, "--url", service.url, "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert (replayed["equal"], replayed["finish_reasons"]) == (True, ["tool_calls"])
    assert replayed["metrics"]["tool_calls"] == 1
    second = answered({"messages": QUESTION})  # to have the record of the replay before it
    again = next(
        it
        for it in trace_read.records(Path(os.environ["HEADRACE_HOME"]) / "traces")
        if it.id not in (first.id, second.id) and it.content and it.content.tools
    )
    assert again.content is not None
    assert again.content == first.content
    assert again.parameters == first.parameters
    assert again.parameters["thinking"]["hidden"] is True
    assert again.parameters["tool_choice"] == {"names": ["weather"], "parallel": False}
    shown = told(capsys, "show", first.id)
    assert ["calls", "1"] in [line.split() for line in shown]
    assert 'weather {"city": "Paris"}' in shown
    assert "assistant: " in shown
    assert "weather {}" in shown
    assert run(["trace", "replay", first.id, "--url", service.url]) == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "The text is equal.",
        "The request is not quite the same: parts of the record are redacted.",
    ]


def test_that_images_and_sounds_are_sent_again(
    service: Service,
    answered: Callable[..., RequestRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue 13: the bytes of an image are not kept; with its file the request can be replayed."""
    data = png(20, 10)
    url = data_url(data)
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    first = answered({"model": "seeing", "messages": [{"role": "user", "content": parts}]})
    replay = ["trace", "replay", first.id, "--url", service.url]
    assert run(replay) == 2
    assert "give its file with --image" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(data)
    assert run([*replay, "--json", "--image", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    assert run([*replay, "--image", str(tmp_path / "none.png")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "a.wav").write_bytes(wav(0.25))
    heard = answered({"model": "seeing", "messages": [spoken("What?", wav(0.25))]})
    replay[2] = heard.id
    assert run(replay) == 2
    assert "has a sound (wav, 0.25 s, 8044 bytes" in capsys.readouterr().err
    assert run([*replay, "--json", "--image", str(tmp_path / "a.wav")]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    assert run(["trace", "show", heard.id]) == 0
    assert "[wav 0.25 s, " in capsys.readouterr().out


def test_that_what_cannot_be_asked_again_is_told(
    service: Service, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = asked(3, operation="embeddings")
    keep(home, record(1), asked(2, parameters={"temperature": 50}), vectors, asked(4))

    def replayed(number: int, *more: str, code: int, url: str = service.url) -> str:
        [line] = told(capsys, "replay", record(number).id, "--url", url, *more, code=code)
        return line

    assert "telemetry.trace_content is true" in replayed(1, code=2)
    assert "temperature" in replayed(2, code=2)
    assert "of embeddings; only texts are replayed" in replayed(3, code=2)
    assert "nowhere" in replayed(4, "--model", "nowhere", code=2)
    assert "No service at" in replayed(4, code=1, url="http://127.0.0.1:9")
    assert run(["trace", "replay", record(4).id, "--model", "broken", "--url", service.url]) == 1
    captured = capsys.readouterr()
    # It is asked once more to go on from there, and breaks again.
    assert captured.out.startswith("goo")
    assert captured.err.startswith("error: ")
