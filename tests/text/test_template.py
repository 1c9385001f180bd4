from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil
import pytest

from headrace.core import confine
from headrace.core.errors import ConfigError, GenerationFailed, InvalidRequest
from headrace.core.request import Message
from headrace.text import renderer
from headrace.text.template import ChatTemplate

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written after the manner of Mistral: turns alternate, system is refused by that rule.
ALTERNATING = """
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/...') }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' ~ message.content ~ ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# After the manner of Gemma: system is refused by name.
REFUSING = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<turn>' ~ role ~ '\n' ~ message.content | trim ~ '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}
"""
# Drops what it does not know without a word.
SILENT = """
{%- for message in messages %}
    {%- if message.role in ('user', 'assistant') %}{{ message.content }};{% endif %}
{%- endfor %}
"""


def template(source: str, deadline_s: float = 2.0) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, deadline_s=deadline_s)


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in pairs]  # type: ignore[arg-type]


def prompt(source: str, *pairs: tuple[str, str], **options: object) -> str:
    return template(source).render(turns(*pairs), options)


def test_smollm2() -> None:
    """W25: the model's own template, character by character."""
    assert prompt(SMOLLM2, ("system", "Be <b>."), ("user", "Hé"), ("assistant", "Yo")) == (
        "<|im_start|>system\nBe <b>.<|im_end|>\n<|im_start|>user\nHé<|im_end|>\n"
        "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_options_reach_the_template() -> None:
    """W25: add_generation_prompt is on unless the caller turns it off."""
    assert (
        prompt(REFUSING, ("user", "a"), add_generation_prompt=False) == "<s><turn>user\na</turn>\n"
    )
    assert prompt("{{ mood }}{{ tools is none }}", ("user", "a"), mood="dark") == "darkTrue"


@pytest.mark.parametrize("name", ["messages", "bos_token", "eos_token"])
def test_options_cannot_replace_the_conversation(name: str) -> None:
    """W25: what the template is for is not the client's to replace."""
    with pytest.raises(InvalidRequest, match=name):
        prompt(SMOLLM2, ("user", "a"), **{name: "x"})


@pytest.mark.parametrize(
    ("source", "roles"),
    [
        (SMOLLM2, ("system", "user", "assistant", "tool")),
        (ALTERNATING, ("user", "assistant")),
        (REFUSING, ("user", "assistant", "tool")),
        (SILENT, ("user", "assistant")),
        ("{{ raise_exception('never') }}", ()),
    ],
)
def test_roles_are_those_whose_content_is_kept(source: str, roles: tuple[str, ...]) -> None:
    """W22, W25: a role that is refused or silently dropped is not a role."""
    assert template(source).roles == roles


@pytest.mark.parametrize("source", [ALTERNATING, REFUSING, SILENT])
def test_system_joins_the_first_user_turn(source: str) -> None:
    """W25: nothing of the system message is lost on a template without one."""
    merged = prompt(source, ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"))
    assert merged == prompt(source, ("user", "Be brief.\n\nHi"), ("assistant", "Yo"))


def test_users_that_follow_one_another_join_where_turns_have_to_alternate() -> None:
    """Issue 14.7: Codex sends what it knows of the machine and the prompt as two user turns."""
    first = [("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    assert prompt(ALTERNATING, *first) == "<s>[INST] a\n\nb [/INST] c</s>[INST] d [/INST]"
    assert prompt(SILENT, *first) == "a;b;c;d;"


# Written after the manner of Qwen: one system message, at the beginning.
FIRST_ONLY = """
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {{- message.role[0] ~ ':' ~ message.content ~ ';' }}
{%- endfor %}
"""


# Drops all but the first.
FIRST = "{% if messages[0].role == 'system' %}s:{{ messages[0].content }};{% endif %}"


def test_late_system_messages_join_the_users() -> None:
    """Issue 14.7: Claude Code sends system messages between the turns."""
    turns = [("system", "a"), ("user", "b"), ("system", "c"), ("assistant", "d"), ("user", "e")]
    assert prompt(FIRST_ONLY, *turns) == "s:a;u:b\n\nc;a:d;u:e;"
    assert prompt(FIRST + SILENT, *turns).split() == ["s:a;b", "c;d;e;"]
    assert prompt(FIRST_ONLY, ("system", "a"), ("system", "b"), ("user", "c")) == "s:a\n\nb;u:c;"


def test_text_after_the_result_of_a_tool_joins_it_where_turns_have_to_alternate() -> None:
    """Issue 14.7: Claude Code sends reminders with the results of tools."""
    source = ALTERNATING.replace("message.role == 'user') !=", "message.role != 'assistant') !=")
    source = source.replace("elif message.role == 'user'", "elif message.role != 'assistant'")
    turns = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d"), ("system", "e")]
    expected = "<s>[INST] a [/INST] b</s>[INST] c\n\nd\n\ne [/INST]"
    assert prompt(source, *turns) == expected


def test_several_system_messages_join_the_users_beside_them() -> None:
    """W25: user and assistant go on alternating wherever the system speaks."""
    first = [("system", "a"), ("developer", "b"), ("user", "c"), ("assistant", "d")]
    second = [("system", "e"), ("user", "f"), ("system", "g"), ("assistant", "h")]
    assert prompt(ALTERNATING, *first, *second, ("system", "i")) == (
        "<s>[INST] a\n\nb\n\nc [/INST] d</s>[INST] e\n\nf\n\ng [/INST] h</s>[INST] i [/INST]"
    )


def test_users_who_speak_twice_are_left_to_the_template() -> None:
    """W25: merging touches nothing but the turns beside a system message."""
    assert prompt(SILENT, ("system", "s"), ("user", "a"), ("user", "b")) == "s\n\na;b;"
    assert prompt(SILENT, ("user", "a"), ("user", "b")) == "a;b;"


def test_developer_is_system_unless_the_template_knows_it() -> None:
    """W25: a newer name for the same role is no reason to fail."""
    assert "<|im_start|>system\nx<" in prompt(SMOLLM2, ("developer", "x"), ("user", "a"))
    knows = "{% for m in messages %}{{ m.role == 'developer' }} {% endfor %}"
    assert prompt(knows, ("developer", "x"), ("user", "a")) == "True False "


def test_the_templates_own_refusal_is_the_clients_to_read() -> None:
    """W25: raise_exception is a 400 with the template's words."""
    with pytest.raises(InvalidRequest) as error:
        prompt(ALTERNATING, ("assistant", "a"), ("user", "b"))
    assert error.value.message == "Roles must alternate user/assistant/user/..."
    assert error.value.param == "messages"


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | nosuch }}", "{{", "{{ " + "(" * 9999])
def test_a_wrong_source_is_refused_when_it_is_given(source: str) -> None:
    """W25: an override that is no template is an error of configuration."""
    with pytest.raises(ConfigError):
        template(source)


def test_a_fault_of_the_template_is_not_the_clients() -> None:
    """W25: an undefined name used is the model's fault."""
    with pytest.raises(GenerationFailed, match="failed"):
        prompt("{{ nothing.at.all }}", ("user", "a"))


def test_options_that_break_the_template_are_the_clients() -> None:
    """W25: the template works without them, so they are what is wrong."""
    with pytest.raises(InvalidRequest) as error:
        prompt("{{ 1 + (effort or 1) }}", ("user", "a"), effort="high")
    assert error.value.param == "template_options"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}x{{ 1 }}{% endgeneration %}", "x1"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        (
            "{{ 'a\nb\n' | indent(2) }}|{{ 'aXb'.replace('X', '-') | replace('b', 'c') }}",
            "a\n  b\n|a-c",
        ),
        (
            "{{ ['a', 1] | join('+') }}{{ '-'.join(['b', 'c']) }}{{ 'n' ~ 1 ~ none ~ x }}",
            "a+1b-cn1None",
        ),
        ("{{ messages | map(attribute='content') | join(', ') }}", "hi"),
        ("{{ messages | join(', ', attribute='role') }}", "user"),
        ("{{ '{:>3}|{}'.format(1, 'x') }}{{ '{{a}}{0[0]}'.format([5]) }}", "  1|x{a}5"),
        (
            "{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 3 * 'c' }}{{ 2 ** 3 }}{{ 2 * 1.5 }}{{ 7 % 4 }}",
            "[1, 2]ababccc83.03",
        ),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set a = [] %}{% do a %}{% with b = 1 %}{{ b }}{% endwith %}", "1"),
        ("{% raw %}{{ a }}{% endraw %}{{ 'b' }}", "{{ a }}b"),
        ("{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}", "<s></s>"),
    ],
)
def test_speaks_the_dialect_of_transformers(source: str, text: str) -> None:
    """W25: filters, tags and white space are what templates are written for."""
    assert prompt(source, ("user", "hi")) == text


LONG = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDLESS = {
    "loops": LONG + "{{ i }}{% endfor %}{% endfor %}",
    "empty loops": LONG + "{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set a = f(n - 1) %}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "blocks": "{% block b %}{% if n %}{% endif %}{% endblock %}"
    + LONG
    + "{{ self.b() }}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in [1] recursive %}" + LONG + "{% endfor %}{% endfor %}"
    "{{ loop([1]) }}{% endfor %}",
}
HUGE = {
    "output": LONG + "0123456789{% endfor %}{% endfor %}",
    "times": "{{ ('x' * 99999999999) | length }}",
    "times, turned": "{{ (99999999999 * 'x') | length }}",
    "lists": "{{ ([1] * 99999999999) | length }}",
    "plus": "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "tilde": "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "set block": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "kept": "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set n.x = n.x + ['x' * 8000000 ~ i] %}{% endfor %}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}",
    "percent": "{{ '%999999999d' % 1 }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "replace": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "replace filter": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "join": "{{ ('x' * 99999).join('y' * 99999) }}",
    "join filter": "{{ range(99999) | join('y' * 99999) }}",
    "indent": "{{ ('x\n' * 99999) | indent(99999) }}",
    "lists in lists": "{% set n = namespace(x=[1]) %}{% for i in range(26) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "lists that double": "{% set n = namespace(x=[1]) %}{% for i in range(26) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "lists compared": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "tuples hashed": "{% set n = namespace(x=(1, 1)) %}{% for i in range(40) %}"
    "{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} | length }}",
    "forceescape": "{{ ('&' * 4000000)" + " | forceescape" * 60 + " }}",
    "tojson often": "{{ ('\\\\' * 1000000)" + " | tojson" * 10 + " }}",
    "tojson of lists in lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "pprint": "{% set n = namespace(x=[1]) %}{% for i in range(30) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | pprint }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "bytes": "{{ ('x'.encode() * 99999999999) | length }}",
    "bytes of a number": "{{ (1).to_bytes(9999999999, 'big') }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "split": "{{ ('a ' * 90000000).split() | length }}",
    "list": "{{ ('a' * 90000000) | list | length }}",
    "tojson": "{{ [[1]] | tojson(indent=9999999999) }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_ends(source: str) -> None:
    """W25: rendering has a deadline."""
    endless = template(source)
    # It is compiled within the time that others have.
    endless._deadline_s = 0.1
    began = time.monotonic()
    with pytest.raises(GenerationFailed, match="limits") as error:
        endless.render(turns(("user", "a")))
    assert error.value.detail == "it took too long"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_template_that_takes_too_much_is_stopped(source: str) -> None:
    """W25, Issue 11.11: by its memory or its time, also within one step of it."""
    # Of all children that have ended, also of other tests.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # What the compiler computes already, it refuses.
    with pytest.raises((GenerationFailed, ConfigError), match=r"limits|cannot be compiled"):
        template(source, deadline_s=0.3).render(turns(("user", "a")))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert after.ru_maxrss * 1024 < max(before.ru_maxrss * 1024 + 1, renderer.MEMORY + (128 << 20))


def test_a_template_that_takes_too_much_as_it_is_compiled_is_refused() -> None:
    """Issue 11.11: constants are computed by the compiler."""
    with pytest.raises(ConfigError, match="cannot be compiled"):
        template("{{ 9 ** 99999999 }}", deadline_s=0.3)


def test_other_renderings_go_on_beside_one_that_takes_too_long() -> None:
    """Issue 11.11: only the process of that rendering is ended."""
    slow, quick = template(HUGE["lists compared"], deadline_s=4), template(SMOLLM2)
    with ThreadPoolExecutor(1) as threads:
        hopeless = threads.submit(slow.render, turns(("user", "a")))
        for _ in range(3):
            assert "user\nb<" in quick.render(turns(("user", "b")))
        assert not hopeless.done()
        assert isinstance(hopeless.exception(), GenerationFailed)


def test_requests_at_a_time_do_not_wait_for_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 15, shown 3: one of the answers of a lost node waited for that at the other node."""
    monkeypatch.setattr(renderer, "_PATIENCE_S", 60.0)
    text = template(SMOLLM2)
    text.render(turns(("user", "a")))
    before = {child.pid for child in psutil.Process().children()}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: text.render(turns(("user", "b"))), range(32)))
    assert {child.pid for child in psutil.Process().children()} <= before


def test_the_process_that_renders_ends_with_its_user() -> None:
    """Issue 11.11: also with one that is killed while a template runs."""
    program = """
import os, sys, threading, time
from headrace.text import renderer
renderer.render(renderer.Work("a", {}, 1.0))
print(renderer._idle[0]._process.pid, flush=True)
endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
threading.Thread(target=renderer.render, args=(renderer.Work(endless, {}, 1.0),)).start()
time.sleep(0.1)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == -9
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(ended.stdout)).wait(10)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    """W25: a template reaches nothing but the conversation, and does not change it."""
    with pytest.raises(GenerationFailed):
        prompt(source, ("user", "a"))


def test_one_template_renders_in_many_threads() -> None:
    """W25: one that runs out of time takes none of the others with it."""
    slow = template(ENDLESS["loops"], deadline_s=0.2)
    quick = template(SMOLLM2)

    def render(number: int) -> str:
        if number % 8 == 0:
            with pytest.raises(GenerationFailed):
                slow.render(turns(("user", "a")))
        return quick.render(turns(("user", str(number))))

    with ThreadPoolExecutor(8) as threads:
        prompts = list(threads.map(render, range(32)))
    assert all(f"user\n{number}<" in text for number, text in enumerate(prompts))


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_others_end_is_replaced(number: signal.Signals) -> None:
    """Issue 11.11: one that was stopped was noticed after 22 s, and the template was blamed."""
    text = template(SMOLLM2)
    before = renderer._idle[-1]._process
    before.send_signal(number)
    began = time.monotonic()
    assert "user\na<" in text.render(turns(("user", "a")))
    assert time.monotonic() - began < 15
    assert before.wait(20) == -signal.SIGKILL


def test_an_answer_of_a_process_has_a_bound() -> None:
    """Issue 11.11: a process that was taken over could make its parent allocate what it says."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((1 << 40).to_bytes(8, "little"))
        with pytest.raises(OSError, match="1099511627776 bytes"):
            renderer._receive(ours)


TAKEN_OVER = """
import json, os, resource, socket, sys
from pathlib import Path
from headrace.text import renderer, sandbox

place, port, fault = sys.argv[2:]

def tried(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"

def render(source, variables):
    if variables is None:
        return ""
    status = Path("/proc/self/status").read_text()
    return json.dumps({
        "write": tried(lambda: Path(place).write_text("x")),
        "connect": tried(lambda: socket.create_connection(("127.0.0.1", int(port)), 5)),
        "privileges": "NoNewPrivs:\\t1" in status,
        "memory": resource.getrlimit(resource.RLIMIT_AS)[0] < renderer.MEMORY + (1 << 30),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    })

def refused(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise OSError("refused")
    return given(kind, limits)

if fault:
    given, resource.setrlimit = resource.setrlimit, refused
sandbox.render = render
renderer.main()
"""


def taken_over(folder: Path, port: int, fault: str = "") -> bytes | None:
    """Return what a process that renders can do with code of its own, or None."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", TAKEN_OVER, str(number), str(folder / "x"), str(port), fault],
            pass_fds=(number,),
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            renderer._send(ours, msgspec.json.encode(renderer.Work("", {}, 10.0)))
            return renderer._receive(ours)
        finally:
            ours.close()
            process.wait(20)


@pytest.mark.skipif(confine.landlock() < 4, reason="this kernel has no Landlock 4")
def test_a_process_that_renders_can_do_nothing_else(tmp_path: Path) -> None:
    """Issue 11.11, 11.14: a template that has left the sandbox finds no rights of the user."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = taken_over(tmp_path, server.getsockname()[1])
    assert answer is not None
    rendered = msgspec.json.decode(answer, type=renderer.Rendered | renderer.Fault)
    assert isinstance(rendered, renderer.Rendered)
    denied = "PermissionError"
    told = msgspec.json.decode(rendered.text)
    assert {told.pop("write"), told.pop("connect")} == {denied}
    assert told == {"privileges": True, "memory": True, "core": 0}


def test_nothing_is_rendered_without_a_limit_of_memory(tmp_path: Path) -> None:
    """Issue 11.11: it went on without one."""
    try:
        assert taken_over(tmp_path, 1, "fault") is None
    except ConnectionError:
        return
