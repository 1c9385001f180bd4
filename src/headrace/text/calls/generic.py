"""Tools for models whose template has none: described in the system message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INTRODUCTION = """\
You can call functions. Each line describes one of them in JSON:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON between tags, for each call:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>
The results come in <tool_response> tags."""

Messages = Sequence[Mapping[str, Any]]


def generic_messages(messages: Messages, tools: Messages) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's form as one without tools.

    Tools are described in the first system message, calls are text of the assistant, and results
    that come one after another are one turn of the user.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] in ("tool", "function"):
            _add_result(turns, message)
        elif message["role"] == "assistant":
            turns.append({"role": "assistant", "content": _spoken(message)})
        else:
            turns.append(dict(message))
    plain = [{key: value for key, value in turn.items() if key != "result"} for turn in turns]
    return _with_system(plain, tools) if tools else plain


def _add_result(turns: list[dict[str, Any]], message: Mapping[str, Any]) -> None:
    content = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
    last = turns[-1] if turns else {}
    if last.get("result"):
        last["content"] += f"\n{content}"
    else:
        turns.append({"role": "user", "content": content, "result": True})


def _spoken(message: Mapping[str, Any]) -> str:
    texts = [message["content"]] if message.get("content") else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(function["name"], ensure_ascii=False)
        body = f'{{"name": {name}, "arguments": {arguments or "{}"}}}'
        texts.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(texts)


def _with_system(turns: list[dict[str, Any]], tools: Messages) -> list[dict[str, Any]]:
    lines = (json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools="\n".join(lines))
    if turns and turns[0]["role"] in ("system", "developer"):
        return [turns[0] | {"content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
