"""A chat: the conversation and its slash commands alone, and at a scripted terminal."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import stat
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from tests.cli.test_top import screen as terminal

from headrace.cli import run as command
from headrace.cli.answer import complete, formatted
from headrace.cli.chat import COMMANDS, HELP, Conversation, Leave, unfinished, unquoted
from headrace.cli.terminal import plain
from headrace.config import Settings, load
from headrace.core.errors import ContextOverflow, InvalidRequest
from headrace.core.events import Delta, Event, Finish, Progress
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.request import Message


class Scripted:
    """Says each question again; `long` overflows, `slow` never ends by itself."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.closed = 0
        self.ended = False
        self.during: Callable[[], object] | None = None

    async def generate_stream(self, **request: Any) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        text = request["messages"][-1].content
        try:
            yield Progress("prefill")
            if text == "long":
                raise ContextOverflow("9 tokens do not fit into 8.")
            for word in text.split():
                yield Delta(f"{word} ", (1,))
            if text == "wait" and self.during:
                self.during()
                await asyncio.Event().wait()
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


def test_what_is_typed_during_an_answer_waits_at_the_prompt(
    worker: Scripted, keys: PipeInput, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 12.29: a paste of lines is one text at the next prompt, and no question by itself."""
    defaults: list[str] = []
    prompt = PromptSession[str].prompt_async

    async def prompted(self: PromptSession[str], message: str, *, default: str) -> str:
        defaults.append(default)
        if default:
            keys.send_text("!\r/bye\r")
        return await prompt(self, message, default=default)

    monkeypatch.setattr(PromptSession, "prompt_async", prompted)
    # Ctrl-C is a key during the answer, and stops it.
    worker.during = lambda: keys.send_text("two\rlinez\x7f\x1b[A\x1b[200~s\r\nand\x1b[201~\r\x03")
    talk(settings, keys, "wait\r")
    assert defaults == ["", "two\nlines\nand", ""]
    questions = [request["messages"][-1].content for request in worker.requests]
    assert questions == ["wait", "two\nlines\nand!"]


def test_typing_during_an_answer_on_a_real_terminal(environ: dict[str, str]) -> None:
    """Issue 12.29: the program in a terminal; nothing typed is seen before the next prompt."""
    options = ("-o", "text=Some **bold** words, slowly, and an end.", "-o", "tokens_per_second=20")
    with terminal(environ, "echo", *options, begin=("run",), PROMPT_TOOLKIT_NO_CPR="1") as shown:
        shown.until(">>>")
        shown.press(b"Hi\r")
        shown.until("Some")
        assert shown.is_raw
        shown.press(b"first line\rsecond line\r")
        answer = shown.until("first token")
        assert "line" not in answer
        assert "**" not in answer.rpartition("end.")[0][-40:]
        prompt = shown.until("second line")
        assert "first line" in prompt
        assert "Some" not in prompt, "they were not sent"
        shown.press(b"\x03\x03\x03")
        assert shown.program.wait(20) == 0


def screen(width: int) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(
        file=text, force_terminal=True, width=width, height=8, color_system="standard"
    ), text


def test_an_answer_is_wrapped_at_words_and_its_markdown_formatted() -> None:
    """Issue 12.29: each block once; line breaks and code stay; the model commands no terminal."""
    console, text = screen(20)
    answer = (
        "Some **bold** words that wrap.\nnext\n\n```\ncode  here\n\nmore\n```\n\n- a\x1b[2J\n- b\n"
    )
    with formatted(console) as write:
        for sign in answer:
            write(sign)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text.getvalue())
    lines = [line.strip() for line in plain.replace("\r", "\n").splitlines()]
    for line in ("Some bold words that", "wrap.", "next", "code  here", "more", "• a[2J", "• b"):
        assert line in lines, (line, lines)
    assert "\x1b[1mbold" in text.getvalue()
    assert "\x1b[2J" not in text.getvalue()
    assert max(map(len, lines)) <= 20


def test_thinking_is_dimmed_before_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Issue 13, thinking: by whole lines; it is left out where the answer is piped."""
    console, text = screen(40)
    with formatted(console) as write:
        for piece in ("Let me ", "see.\nYes", "."):
            write(piece, thinking=True)
        write("Done.")
    assert re.search(r"\x1b\[2m *Let me see\.", text.getvalue())
    assert text.getvalue().index("Yes.") < text.getvalue().index("Done.")
    with plain() as write:
        write("Let me see.", thinking=True)
        write("Done.")
    assert capsys.readouterr().out == "Done.\n"


def test_the_chat_switches_thinking() -> None:
    """Issue 13, thinking: `/think` alone leaves it to the model."""
    conversation = Conversation("m", thinking="low")
    assert conversation.request()["thinking"] == "low"
    conversation.command("/think off")
    assert conversation.request()["thinking"] == "off"
    with pytest.raises(InvalidRequest, match="on, off"):
        conversation.command("/think perhaps")
    conversation.command("/think")
    assert "thinking" not in conversation.request()


def test_a_spinner_turns_until_the_first_token() -> None:
    """Issue 12.29: and an answer without text leaves nothing."""
    console, text = screen(20)
    with formatted(console):
        assert "⠋" in text.getvalue()
    assert text.getvalue().endswith("\r\x1b[2K\x1b[?25h\r")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("one\ntwo", "one\ntwo"),
        ("one\n\n", "one\n\n"),
        ("one\n\ntwo", "two"),
        ("- one\n\n  more", "- one\n\n  more"),
        ("```\none\n\ntwo", "```\none\n\ntwo"),
        ("```\none\n\ntwo\n```\n\nthree", "three"),
        ("~~~\n```\n\ntwo", "~~~\n```\n\ntwo"),
    ],
)
def test_blocks_that_are_complete(text: str, kept: str) -> None:
    assert text[complete(text) :] == kept


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
    assert "9 tokens do not fit into 8. The question was not sent; /clear" in (
        capsys.readouterr().err
    )


def test_a_home_that_cannot_be_written_costs_only_the_history(
    worker: Scripted, keys: PipeInput, settings: Settings
) -> None:
    settings.config.home.write_text("a file is in the way")
    talk(settings, keys, "Hi\r\x04")
    assert len(worker.requests) == 1


@pytest.fixture
def conversation() -> Conversation:
    conversation = Conversation("m", system="Be brief.", sampling={"max_tokens": 8})
    conversation.ask("Hello")
    conversation.answered("Hi")
    return conversation


def test_a_request_has_system_history_and_sampling(conversation: Conversation) -> None:
    conversation.ask("And?")
    assert conversation.request() == {
        "messages": [
            Message("system", "Be brief."),
            Message("user", "Hello"),
            Message("assistant", "Hi"),
            Message("user", "And?"),
        ],
        "max_tokens": 8,
    }


def test_a_question_without_an_answer_is_taken_back(conversation: Conversation) -> None:
    conversation.ask("too long")
    conversation.answered("")
    assert [message.content for message in conversation.messages] == ["Hello", "Hi"]


def test_every_command_is_in_the_help() -> None:
    """L: the chat has slash commands."""
    helped = {line.split()[0] for line in HELP.splitlines() if line.startswith("/")}
    assert helped == set(COMMANDS) - {"/?", "/exit"}


def test_set_reads_values_by_their_type(conversation: Conversation) -> None:
    conversation.command("/set temperature 0")
    conversation.command("/set seed 7")
    conversation.command("/set stop_token_ids 1,2")
    conversation.command('/set stop ["END", "\\n"]')
    conversation.command("/set ignore_eos true")
    conversation.command("/set max_tokens")
    assert conversation.sampling == {
        "temperature": 0.0,
        "seed": 7,
        "stop_token_ids": (1, 2),
        "stop": ("END", "\n"),
        "ignore_eos": True,
    }
    assert conversation.command("/set") == "sampling: " + " ".join(
        f"{key}={value}" for key, value in conversation.sampling.items()
    )


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("/set temprature 1", "temprature cannot be set"),
        ("/set seed x", "seed: Expected `int | null`"),
        ("/set temperature 9", "temperature must be between 0 and 2."),
        ("/nothing", "/nothing is no command"),
        ("/save", "Name a file"),
    ],
)
def test_wrong_commands_say_what_is_wrong(conversation: Conversation, line: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        conversation.command(line)
    assert part in caught.value.message


def test_system_clear_and_bye(conversation: Conversation) -> None:
    conversation.command("/system Speak French.")
    assert conversation.request()["messages"][0] == Message("system", "Speak French.")
    conversation.command("/system")
    assert conversation.request()["messages"][0].role == "user"
    conversation.command("/clear")
    assert conversation.messages == []
    with pytest.raises(Leave):
        conversation.command("/bye")


def test_retry_asks_the_same_again(conversation: Conversation) -> None:
    assert conversation.command("/retry") is None
    assert conversation.messages == [Message("user", "Hello")]
    conversation.command("/clear")
    with pytest.raises(InvalidRequest, match="no question"):
        conversation.command("/retry")


def test_save_and_load_keep_everything_for_the_owner_alone(
    conversation: Conversation, tmp_path: Path
) -> None:
    conversation.command("/set stop END")
    path = tmp_path / "talk.json"
    conversation.command(f"/save {path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = Conversation("n")
    assert other.command(f"/load {path}") == f"Loaded 2 messages from {path}."
    assert other.request() == conversation.request()


def test_load_refuses_what_is_no_conversation(conversation: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"model": "m", "messages": [{"role": "boss", "content": "x"}]}')
    with pytest.raises(ValueError, match="boss"):
        conversation.command(f"/load {path}")
    assert len(conversation.messages) == 2


@pytest.mark.parametrize(
    ("typed", "more", "meant"),
    [
        ("one", False, "one"),
        ("one\\", True, "one\\"),
        ("one\\\ntwo", False, "one\ntwo"),
        ('"""', True, '"""'),
        ('"""one', True, '"""one'),
        ('"""one\ntwo"""', False, "one\ntwo"),
        ('"""\none\n"""', False, "one"),
        ('say """x"""', False, 'say """x"""'),
    ],
)
def test_several_lines(typed: str, more: bool, meant: str) -> None:
    assert unfinished(typed) is more
    assert unquoted(typed) == meant
