"""Compiles the constraints of requests and checks answers, in processes that can be ended."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec
import psutil

from headrace.core.constraint import Constraint
from headrace.core.errors import ConstraintViolated, GenerationFailed, InvalidRequest
from headrace.core.request import GenerateRequest
from headrace.core.schema import Schema, pointer
from headrace.core.tools import Tool
from headrace.text.grammar import grammar, without_formats
from headrace.worker.places import Places

_NAMES = {"json_schema": "JSON schema", "lark": "grammar"}
_NO_TOOLS: Mapping[str, Schema] = {}
_COMPILING, _CHECKING = 2, 1
_WALL_S = 20.0
_LOOK_S = 0.5
_TRIES = 2
_IDLE_S = 60.0
_REMEMBERED = 256
_LONGEST_REPLY = 16 << 20
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")


class _Reply(msgspec.Struct, frozen=True):
    path: tuple[str, ...] = ()
    reason: str = ""
    lark: str = ""


_decode = msgspec.json.Decoder(_Reply).decode


class Compiler:
    """Asks the compiler of an engine, in a few processes that start when they are needed.

    `library` is the file that the engine's llguidance is part of; empty is the package of that
    name. A client that leaves ends the process that works for it, and one that sends many schemas
    has one of them compiled at a time.
    """

    def __init__(self, library: str = "") -> None:
        self._library = library
        self._compiling = Places(_COMPILING)
        self._checking = asyncio.Semaphore(_CHECKING)
        self._processes: set[Process] = set()
        self._idle: list[tuple[Process, asyncio.TimerHandle]] = []
        self._compiled: OrderedDict[bytes, Constraint | None] = OrderedDict()

    async def compile(
        self,
        constraint: Constraint,
        client: str = "",
        tools: Mapping[str, Schema] = _NO_TOOLS,
        quoted: str | None = None,
    ) -> Constraint:
        """Compile a constraint, once; return it as engines take it.

        `tools` are the schemas of the tools that it is made of, by name. With `quoted` the grammar
        is returned as the body of one of text inside a JSON string, where those are escaped too.

        Raises:
            InvalidRequest: it cannot be enforced, or takes too much to compile; names the place.
        """
        job = await asyncio.to_thread(_job, constraint)
        if tools:
            job["tools"] = {name: without_formats(tools[name], strict=False) for name in tools}
        if quoted is not None:
            job["quoted"] = quoted
        key = hashlib.blake2b(msgspec.json.encode(job)).digest()
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key] or constraint
        async with self._compiling.place(client):
            reply = await self._run(job)
        if reply.reason and tools and reply.path:
            name, *path = reply.path
            where = f"{pointer(tuple(path))} in the" if path else "The"
            problem = f"{where} JSON schema of the tool {name} {reply.reason}."
            raise InvalidRequest(problem, param="tools")
        if reply.reason:
            raise constraint.refusal(reply.reason, reply.path)
        converted = Constraint(lark=reply.lark) if reply.lark else None
        self._compiled[key] = converted
        if len(self._compiled) > _REMEMBERED:
            self._compiled.popitem(last=False)
        return converted or constraint

    async def compile_for(self, request: GenerateRequest, constraint: Constraint) -> Constraint:
        """Compile the constraint of a request, and the one that was made of its tools.

        Raises:
            InvalidRequest: as `compile`; names the tool whose schema cannot be enforced.
        """
        if request.constraint is not None:
            compiled = await self.compile(request.constraint, request.client)
            if constraint is request.constraint:
                return compiled
        try:
            return await self.compile(constraint, request.client, request.enforced_tools)
        except InvalidRequest as error:
            if error.param == "tools":
                raise
            for tool in request.tool_choice.allowed(request.tools):
                await self._check_tool(tool, request.client)
            raise InvalidRequest(error.message, param="tools") from None

    async def _check_tool(self, tool: Tool, client: str) -> None:
        try:
            await self.compile(Constraint(json_schema=tool.parameters or {}), client)
        except InvalidRequest as error:
            message = f"The parameters of the tool {tool.name}: {error.message}"
            raise InvalidRequest(message, param="tools") from None

    async def check(self, constraint: Constraint, text: str, *, cut: bool) -> None:
        """Check an answer; of one that was cut, only that it begins as it should.

        Raises:
            ConstraintViolated: it does not keep to the constraint.
        """
        if constraint.choice:
            begins = any(choice.startswith(text) for choice in constraint.choice)
            kept = begins if cut else text in constraint.choice
            reply = _Reply() if kept else _Reply(reason="does not have it")
        else:
            job = await asyncio.to_thread(_job, constraint, strict=False)
            async with self._checking:
                reply = await self._run(job | {"text": text, "cut": cut})
        if reply.reason:
            where = constraint.refusal(reply.reason, reply.path).message
            form = _NAMES.get(constraint.form, constraint.form)
            message = f"The answer does not keep to its {form}."
            raise ConstraintViolated(message, param=constraint.param, detail=where)

    async def aclose(self) -> None:
        """End the processes."""
        for _, timer in self._idle:
            timer.cancel()
        self._idle.clear()
        for process in tuple(self._processes):
            await self._end(process)

    async def _run(self, job: dict[str, Any]) -> _Reply:
        """Return the reply to a job; try again if another has stopped or killed the process.

        Raises:
            GenerationFailed: there is none.
        """
        data = msgspec.json.encode(job) + b"\n"
        for _ in range(_TRIES):
            process = await self._process()
            line = b""
            try:
                async with asyncio.timeout(_WALL_S):
                    line = await _answered(process, data)
            except TimeoutError:
                # What a job may take of a core has long been taken: this machine is too busy.
                message = f"The compiler of constraints did not answer within {_WALL_S:g} s."
                raise GenerationFailed(message) from None
            finally:
                if line:
                    self._rest(process)
                else:
                    await self._end(process)
            if line:
                return _decode(line)
        raise GenerationFailed("The compiler of constraints has ended.")

    async def _process(self) -> Process:
        while self._idle:
            process, timer = self._idle.pop()
            timer.cancel()
            if process.returncode is None:
                return process
            self._processes.discard(process)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "headrace.worker.compiling"),
            *([self._library] if self._library else ()),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            limit=_LONGEST_REPLY,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            # It is ended together with the process of its job.
            start_new_session=True,
        )
        self._processes.add(process)
        return process

    def _rest(self, process: Process) -> None:
        def expire() -> None:
            self._idle.remove(entry)
            self._processes.discard(process)
            if process.stdin is not None:
                process.stdin.close()

        entry = (process, asyncio.get_running_loop().call_later(_IDLE_S, expire))
        self._idle.append(entry)

    async def _end(self, process: Process) -> None:
        self._processes.discard(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _answered(process: Process, data: bytes) -> bytes:
    """Return the line that a process answers with; empty if it has ended, or was stopped."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(data)
    reading = asyncio.ensure_future(process.stdout.readline())
    try:
        while not reading.done():
            await asyncio.wait({reading}, timeout=_LOOK_S)
            if not reading.done() and _is_stopped(process.pid):
                return b""
        return reading.result()
    except ConnectionError:
        return b""
    finally:
        reading.cancel()


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _job(constraint: Constraint, *, strict: bool = True) -> dict[str, Any]:
    match constraint.form:
        case "json_schema":
            return {"schema": without_formats(constraint.json_schema, strict=strict)}
        case "grammar":
            return {"grammar": constraint.grammar}
        case "regex":
            return {"lark": grammar(constraint), "regex": constraint.regex}
        case "choice" | "lark":
            return {"lark": grammar(constraint)}
