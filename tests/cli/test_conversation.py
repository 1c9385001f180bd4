"""What was said in a chat, and the slash commands, without a terminal."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from headrace.cli.chat import COMMANDS, HELP, Conversation, Leave, unfinished, unquoted
from headrace.core.errors import InvalidRequest
from headrace.core.request import Message


@pytest.fixture
def talk() -> Conversation:
    conversation = Conversation("m", system="Be brief.", sampling={"max_tokens": 8})
    conversation.ask("Hello")
    conversation.answered("Hi")
    return conversation


def test_a_request_has_system_history_and_sampling(talk: Conversation) -> None:
    talk.ask("And?")
    assert talk.request() == {
        "messages": [
            Message("system", "Be brief."),
            Message("user", "Hello"),
            Message("assistant", "Hi"),
            Message("user", "And?"),
        ],
        "max_tokens": 8,
    }


def test_a_question_without_an_answer_is_taken_back(talk: Conversation) -> None:
    talk.ask("too long")
    talk.answered("")
    assert [message.content for message in talk.messages] == ["Hello", "Hi"]


def test_every_command_is_in_the_help() -> None:
    """L: the chat has slash commands."""
    helped = {line.split()[0] for line in HELP.splitlines() if line.startswith("/")}
    assert helped == set(COMMANDS) - {"/?", "/exit"}


def test_set_reads_values_by_their_type(talk: Conversation) -> None:
    talk.command("/set temperature 0")
    talk.command("/set seed 7")
    talk.command("/set stop_token_ids 1,2")
    talk.command('/set stop ["END", "\\n"]')
    talk.command("/set ignore_eos true")
    talk.command("/set max_tokens")
    assert talk.sampling == {
        "temperature": 0.0,
        "seed": 7,
        "stop_token_ids": (1, 2),
        "stop": ("END", "\n"),
        "ignore_eos": True,
    }
    assert talk.command("/set") == "sampling: " + " ".join(
        f"{key}={value}" for key, value in talk.sampling.items()
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
def test_wrong_commands_say_what_is_wrong(talk: Conversation, line: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        talk.command(line)
    assert part in caught.value.message


def test_system_clear_and_bye(talk: Conversation) -> None:
    talk.command("/system Speak French.")
    assert talk.request()["messages"][0] == Message("system", "Speak French.")
    talk.command("/system")
    assert talk.request()["messages"][0].role == "user"
    talk.command("/clear")
    assert talk.messages == []
    with pytest.raises(Leave):
        talk.command("/bye")


def test_retry_asks_the_same_again(talk: Conversation) -> None:
    assert talk.command("/retry") is None
    assert talk.messages == [Message("user", "Hello")]
    talk.command("/clear")
    with pytest.raises(InvalidRequest, match="no question"):
        talk.command("/retry")


def test_save_and_load_keep_everything_for_the_owner_alone(
    talk: Conversation, tmp_path: Path
) -> None:
    talk.command("/set stop END")
    path = tmp_path / "talk.json"
    talk.command(f"/save {path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = Conversation("n")
    assert other.command(f"/load {path}") == f"Loaded 2 messages from {path}."
    assert other.request() == talk.request()


def test_load_refuses_what_is_no_conversation(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"model": "m", "messages": [{"role": "boss", "content": "x"}]}')
    with pytest.raises(ValueError, match="boss"):
        talk.command(f"/load {path}")
    assert len(talk.messages) == 2


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
