"""The chat at a scripted terminal, over a scripted worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from headrace.cli import run as command
from headrace.config import Settings, load
from headrace.core.errors import ContextOverflow
from headrace.core.events import Delta, Event, Finish, Progress
from headrace.core.metrics import InferenceMetrics, Usage


class Scripted:
    """Says each question again; `long` overflows, `slow` never ends by itself."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.closed = 0
        self.ended = False

    async def generate_stream(self, **request: Any) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        text = request["messages"][-1].content
        try:
            yield Progress("prefill")
            if text == "long":
                raise ContextOverflow("9 tokens do not fit into 8.")
            for word in text.split():
                yield Delta(f"{word} ", (1,))
            if text == "slow":
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()
            yield Finish(("stop",), Usage(completion_tokens=1), InferenceMetrics(started_at=0.0))
        finally:
            self.closed += 1

    async def aclose(self) -> None:
        self.ended = True


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(command, "loaded", lambda *_: aclosing(scripted))
    return scripted


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(environ={"HOME": str(tmp_path), "HEADRACE_HOME": str(tmp_path / "h")}, cwd=tmp_path)


def talk(settings: Settings, keys: PipeInput, typed: str, **options: Any) -> None:
    keys.send_text(typed)

    async def run() -> None:
        async with asyncio.timeout(10):
            await command.chat(settings, settings.model_spec("echo"), **options)

    asyncio.run(run())


def test_turns_commands_and_the_end(
    worker: Scripted, keys: PipeInput, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """L: a chat with history, several lines and slash commands."""
    typed = 'Hi\r/set seed 5\r"""two\rlines"""\rone\\\rtwo\r/nonsense\r\x04'
    talk(settings, keys, typed, system="S", sampling={"max_tokens": 4})
    asked = [request["messages"][-1].content for request in worker.requests]
    assert asked == ["Hi", "two\nlines", "one\ntwo"]
    roles = [message.role for message in worker.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert worker.requests[1]["seed"] == 5
    assert worker.requests[0]["max_tokens"] == 4
    assert worker.closed == 3
    assert worker.ended
    told = capsys.readouterr()
    assert told.out == "Hi \ntwo lines \none two \n"
    assert "/nonsense is no command" in told.err
    assert "1 tokens" in told.err
    history = (settings.config.home / "chat_history").read_text()
    assert "+Hi" in history


def test_alt_enter_writes_a_new_line(worker: Scripted, keys: PipeInput, settings: Settings) -> None:
    talk(settings, keys, "a\x1b\rb\r/bye\r")
    assert worker.requests[0]["messages"][-1].content == "a\nb"


def test_ctrl_c_stops_the_answer_and_not_the_program(
    worker: Scripted, keys: PipeInput, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """L, W18: the stream is closed, what was said stays, and the chat goes on."""
    before = signal.getsignal(signal.SIGINT)
    talk(settings, keys, "slow\rnext\r\x04")
    assert [len(request["messages"]) for request in worker.requests] == [1, 3]
    assert worker.requests[1]["messages"][1].content == "slow "
    assert worker.closed == 2
    assert "(stopped)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_at_an_empty_prompt_leaves(
    worker: Scripted, keys: PipeInput, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(settings, keys, "begun\x03\x03\x03never asked\r")
    assert worker.requests == []
    assert worker.ended
    assert capsys.readouterr().err.count("Ctrl-C again") == 1


def test_a_conversation_that_no_longer_fits_goes_on(
    worker: Scripted, keys: PipeInput, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(settings, keys, "long\rshort\r\x04")
    assert [message.content for message in worker.requests[1]["messages"]] == ["short"]
    assert "9 tokens do not fit into 8. The question was not asked; /clear" in (
        capsys.readouterr().err
    )


def test_a_home_that_cannot_be_written_costs_only_the_history(
    worker: Scripted, keys: PipeInput, settings: Settings
) -> None:
    settings.config.home.write_text("a file is in the way")
    talk(settings, keys, "Hi\r\x04")
    assert len(worker.requests) == 1
