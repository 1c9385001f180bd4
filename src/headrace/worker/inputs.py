"""What a request needs before its job, and checks of its calls."""

from __future__ import annotations

import asyncio

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ConstraintViolated,
    InvalidRequest,
    RequestError,
    Unsupported,
)
from headrace.core.request import GenerateRequest
from headrace.core.tools import Tool
from headrace.worker.compiler import Compiler
from headrace.worker.prompt import Prompter


def has_inputs(request: GenerateRequest) -> bool:
    """Whether a tool that may be called takes text of a grammar."""
    return any(tool.input for tool in request.tool_choice.allowed(request.tools))


def is_tokenized(request: GenerateRequest) -> bool:
    """Whether a prompt is token ids alone, for which neither template nor tokenizer is called."""
    return isinstance(request.prompt, tuple) and not (
        request.answered or request.echo or request.suffix is not None or request.media_parts
    )


async def with_inputs(
    request: GenerateRequest, prompter: Prompter, compiler: Compiler
) -> GenerateRequest:
    """Return a request with the grammars of its tools as the model's calls have them.

    An engine without grammars does not get them: the calls are checked at the end.

    Raises:
        Unsupported: a call is required, and the engine takes no grammars.
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
        if request.tool_choice.mode == "required" and not prompter.enforces_grammars:
            raise _named(tool, Unsupported("This engine does not enforce a grammar."))
        try:
            made = await compiler.compile(tool.input, request.client, quoted=also)
        except InvalidRequest as error:
            raise _named(tool, error) from None
        tools[index] = msgspec.structs.replace(tool, input=made)
    return msgspec.structs.replace(request, tools=tuple(tools))


async def check_call(
    compiler: Compiler, request: GenerateRequest, name: str, arguments: str
) -> None:
    """Check a finished call against the schema and the grammar that the request enforces.

    Raises:
        ConstraintViolated: it does not keep to one of them.
    """
    checks = [
        ("JSON schema", Constraint(json_schema=schema), arguments)
        for schema in request.tool_choice.enforced(request.tools, name)
    ]
    for tool in request.tools:
        if tool.name == name and tool.input is not None:
            text = str(msgspec.json.decode(arguments).get("input"))
            checks.append(("grammar", tool.input, text))
    for form, constraint, text in checks:
        try:
            await compiler.check(constraint, text, cut=False)
        except ConstraintViolated as error:
            problem = f"A call of the tool {name} does not keep to its {form}."
            raise ConstraintViolated(problem, param="tools", detail=error.detail) from None


def _named(tool: Tool, error: RequestError) -> RequestError:
    return type(error)(f"The input of the tool {tool.name}: {error.message}", param="tools")
