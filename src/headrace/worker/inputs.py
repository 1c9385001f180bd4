"""Grammars of custom tools, as those of text inside the JSON strings of calls."""

from __future__ import annotations

import asyncio

import msgspec

from headrace.core.errors import InvalidRequest, RequestError, Unsupported
from headrace.core.request import GenerateRequest
from headrace.core.tools import Tool
from headrace.worker.compiler import Compiler
from headrace.worker.prompt import Prompter


def has_inputs(request: GenerateRequest) -> bool:
    """Whether a tool that may be called takes text of a grammar."""
    return any(tool.input for tool in request.tool_choice.allowed(request.tools))


async def with_inputs(
    request: GenerateRequest, prompter: Prompter, compiler: Compiler
) -> GenerateRequest:
    """Return a request with the grammars of its tools as the model's calls have them.

    Raises:
        Unsupported: the engine takes no grammars.
        InvalidRequest: a grammar cannot be enforced; names the tool.
    """
    chat = prompter.chat
    if chat is None:
        return request
    also = await asyncio.to_thread(lambda: chat.format.escaped)
    allowed, tools = request.tool_choice.allowed(request.tools), list(request.tools)
    for index, tool in enumerate(tools):
        if tool.input is None or tool not in allowed:
            continue
        if not prompter.enforces_grammars:
            raise _named(tool, Unsupported("This engine does not enforce a grammar."))
        try:
            made = await compiler.compile(tool.input, request.client, quoted=also)
        except InvalidRequest as error:
            raise _named(tool, error) from None
        tools[index] = msgspec.structs.replace(tool, input=made)
    return msgspec.structs.replace(request, tools=tuple(tools))


def _named(tool: Tool, error: RequestError) -> RequestError:
    return type(error)(f"The input of the tool {tool.name}: {error.message}", param="tools")
