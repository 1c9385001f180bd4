"""How each family writes calls, as functions from the calls to text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]
Writer = Callable[[Sequence[Call]], str]


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def named(name: str, arguments: object, name_key: str = "name", key: str = "arguments") -> str:
    return f'{{"{name_key}": "{name}", "{key}": {dumps(arguments)}}}'


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{named(*call)}\n</tool_call>" for call in calls)


def listed(opening: str, closing: str = "") -> Writer:
    return lambda calls: opening + "[" + ", ".join(named(*call) for call in calls) + "]" + closing


def llama3(calls: Sequence[Call]) -> str:
    return "; ".join(named(*call, key="parameters") for call in calls)


def command(calls: Sequence[Call]) -> str:
    rows = (
        f'    {{"tool_call_id": "{number}", {named(*call, "tool_name", "parameters")[1:]}'
        for number, call in enumerate(calls)
    )
    return "<|START_ACTION|>[\n" + ",\n".join(rows) + "\n]<|END_ACTION|>"


def each(opening: str, middle: str, closing: str, first: str = "", last: str = "") -> Writer:
    def write(calls: Sequence[Call]) -> str:
        parts = (
            (opening + name + middle + dumps(arguments) + closing).replace("#", str(number))
            for number, (name, arguments) in enumerate(calls)
        )
        return first + "".join(parts) + last

    return write


def tagged(opening: str, pair: str, closing: str, first: str = "", last: str = "") -> Writer:
    """`pair` has K, V, and T for what depends on the type."""

    def value(key: str, content: object) -> str:
        text = content if isinstance(content, str) else dumps(content)
        kind = "string" if isinstance(content, str) else "number"
        flag = "true" if isinstance(content, str) else "false"
        head, _, tail = pair.partition("V")
        head = head.replace("K", key).replace("TYPE", kind).replace("FLAG", flag)
        return head + text + tail

    def write(calls: Sequence[Call]) -> str:
        return (
            first
            + "".join(
                opening.replace("N", name)
                + "".join(value(*pair) for pair in arguments.items())
                + closing
                for name, arguments in calls
            )
            + last
        )

    return write


def python(opening: str = "[", closing: str = "]") -> Writer:
    def write(calls: Sequence[Call]) -> str:
        texts = (
            f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
            for name, arguments in calls
        )
        return opening + ", ".join(texts) + closing

    return write


def gemma(opening: str, closing: str, quote: str) -> Writer:
    def value(content: object) -> str:
        if isinstance(content, str):
            return quote + content + quote
        if isinstance(content, dict):
            return "{" + ",".join(f"{key}:{value(item)}" for key, item in content.items()) + "}"
        if isinstance(content, list):
            return "[" + ",".join(map(value, content)) + "]"
        return dumps(content)

    def write(calls: Sequence[Call]) -> str:
        return "".join(f"{opening}call:{name}{value(args)}{closing}" for name, args in calls)

    return write


def harmony(calls: Sequence[Call]) -> str:
    name, arguments = calls[0]
    text = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    text += dumps(arguments) + "<|call|>"
    return text + "".join("<|start|>assistant" + harmony([call]) for call in calls[1:])


def dsml(section: str) -> Writer:
    bar, end = "<｜DSML｜", "</｜DSML｜"
    return tagged(
        f'{bar}invoke name="N">\n',
        f'{bar}parameter name="K" string="FLAG">V{end}parameter>\n',
        f"{end}invoke>\n",
        f"{bar}{section}>\n",
        f"{end}{section}>",
    )


_CALLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")

WRITERS: dict[str, Writer] = {
    "hermes": hermes,
    "generic": hermes,
    "qwen-xml": tagged(
        "<tool_call>\n<function=N>\n",
        "<parameter=K>\nV\n</parameter>\n",
        "</function>\n</tool_call>\n",
    ),
    "llama3": llama3,
    "llama4": python(),
    "lfm2": python("<|tool_call_start|>[", "]<|tool_call_end|>"),
    "mistral": listed("[TOOL_CALLS] "),
    "mistral-args": each("[TOOL_CALLS]", "[ARGS]", ""),
    "deepseek-v3": each(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        "\n```json\n",
        "\n```<｜tool▁call▁end｜>\n",
        *_CALLS,
    ),
    "deepseek-v3.1": each(
        "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", *_CALLS
    ),
    "deepseek-v3.2": dsml("function_calls"),
    "deepseek-v4": dsml("tool_calls"),
    "deepseek-v4.1": dsml(" calls"),
    "harmony": harmony,
    "glm-4.5": tagged(
        "<tool_call>N\n",
        "<arg_key>K</arg_key>\n<arg_value>V</arg_value>\n",
        "</tool_call>\n",
    ),
    "glm-4.7": tagged(
        "<tool_call>N", "<arg_key>K</arg_key><arg_value>V</arg_value>", "</tool_call>"
    ),
    "kimi-k2": each(
        "<|tool_call_begin|>functions.",
        ":#<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        *_KIMI,
    ),
    "kimi-k3": tagged(
        '<|open|>call tool="N" index="1"<|sep|>',
        '<|open|>argument key="K" type="TYPE"<|sep|>V<|close|>argument<|sep|>',
        "<|close|>call<|sep|>",
        "<|open|>tools<|sep|>",
        "<|close|>tools<|sep|>",
    ),
    "minimax-m2": tagged(
        '<invoke name="N">\n',
        '<parameter name="K">V</parameter>\n',
        "</invoke>\n",
        "<minimax:tool_call>\n",
        "</minimax:tool_call>",
    ),
    "gemma-4": gemma("<|tool_call>", "<tool_call|>", '<|"|>'),
    "functiongemma": gemma("<start_function_call>", "<end_function_call>", "<escape>"),
    "granite-3": listed("<|tool_call|>"),
    "command": command,
    "functionary-v3.1": each("<function=", ">", "</function>"),
    "functionary-v3.2": each(">>>", "\n", ""),
}
