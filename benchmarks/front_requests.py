"""The requests of front.py: those of each route, and those whose answers are parsed."""

from __future__ import annotations

from typing import Any

ROUTES = {
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "ollama": "/api/chat",
    "llama": "/completion",
}
PARSERS: dict[str, dict[str, Any]] = {
    "off": {},
    "on": {
        "tools": [{"type": "function", "function": {"name": "get_time"}}],
        "reasoning_effort": "high",
    },
}
"""The fields of a request by whether its answer is parsed."""
TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages -%}
{%- if loop.last %}\x1e{% endif %}
{%- if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif -%}
{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{%- endfor -%}
{%- if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}"""
"""A template with tools and thinking, of which the echo engine repeats the last message."""


def body_of(speed: float, seconds: float) -> dict[str, Any]:
    """Return a request whose stream lasts that long at so many tokens/s."""
    tokens = int(speed * seconds)
    return {"prompt": "abcdefgh" * 8, "max_tokens": tokens, "stream": True, "ignore_eos": True}


def body_by(route: str, speed: float, seconds: float) -> dict[str, Any]:
    """Return a request of `ROUTES` or `PARSERS`, of which the engine repeats the message."""
    tokens = int(speed * seconds)
    text = "abcdefgh" * (tokens // 8 + 1)
    if route == "responses":
        return {"input": text, "max_output_tokens": tokens, "stream": True}
    if route == "llama":
        return {"prompt": text, "n_predict": tokens, "stream": True}
    if route == "ollama":
        messages = [{"role": "user", "content": text}]
        return {"model": "echo", "messages": messages, "options": {"num_predict": tokens}}
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "max_tokens": tokens, "stream": True}
    return body | PARSERS.get(route, {})
