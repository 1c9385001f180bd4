"""Facts: the metadata of the engine, its options and the model."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from headrace import engines
from headrace.core.errors import ConfigError, HeadraceError, Unsupported
from headrace.core.request import EmbedRequest, GenerateRequest, RerankRequest
from headrace.core.stream import collect_ranking, collect_vectors
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import Subject, check, refusal

_LOOK = """
import sys
from headrace import engines
name, library = sys.argv[1:]
engines.about(name), engines.options(name), engines.status(name)
sys.exit(library in sys.modules)
"""


@case("W2 W26", task=None)
async def is_known(subject: Subject) -> None:
    """It is found by name, can run here, and reads the model's format and task."""
    about, status = engines.about(subject.engine), engines.status(subject.engine)
    check(status.available, status.reason)
    info = subject.info
    check(info.engine == subject.engine, f"The model runs on {info.engine}.")
    check(info.format in about.formats, f"{info.format} is not in {about.formats}.")
    tasks = subject.capabilities.tasks
    check(tasks, "The model has no task.")
    check(tasks <= {*about.tasks}, f"It declares {sorted(tasks)}, and ABOUT {about.tasks}.")
    able = subject.capabilities.abilities
    check(able <= about.able, f"It declares {sorted(able)}, and ABOUT {sorted(about.able)}.")


@case("W1", task=None)
async def is_read_without_its_library(subject: Subject) -> None:
    """The metadata of the engine and its options can be read without its library."""
    library = engines.about(subject.engine).requires
    if library is None:
        return
    command = [sys.executable, "-P", "-c", _LOOK, subject.engine, library]
    done = await asyncio.to_thread(subprocess.run, command, check=False, capture_output=True)
    errors = done.stderr.decode(errors="replace")[-300:]
    check(done.returncode == 0, f"Reading its options imports {library}. {errors}")


@case("W3", task=None)
async def options_describe_themselves(subject: Subject) -> None:
    """Each option has a description and a sound default; an unknown one is refused by name."""
    model = engines.options(subject.engine)
    for name, field in model.model_fields.items():
        check(field.description, f"Option {name} has no description.")
        check(not field.is_required(), f"Option {name} has no default.")
    plain = model()
    check(model(**plain.model_dump()) == plain, "Its own defaults are not accepted again.")
    try:
        engines.check_options(subject.engine, {"no_such_option": 1})
    except ConfigError as error:
        check("no_such_option" in error.message, "The error does not name the option.")
        return
    check(False, "An unknown option is accepted.")


@case("W22", task=None)
async def metadata_is_complete(subject: Subject) -> None:
    """The model's metadata: identity, engine and why, format, context, template, memory, state."""
    info = subject.info
    empty = [
        name for name in ("id", "source", "engine", "engine_reason") if not getattr(info, name)
    ]
    check(not empty, f"There is no {', '.join(empty)}.")
    check(info.state == "ready", f"The state is {info.state}.")
    check(info.created > 0, "It has no time of creation.")
    check(bool(info.roles) == subject.capabilities.chat, "Roles and chat do not go together.")
    if subject.is_remote:
        return
    check(bool(info.chat_template) >= subject.capabilities.chat, "It chats without a template.")
    check(info.device not in ("", "auto"), f"The device is {info.device!r}.")
    check(info.load_ms, "It has no load time.")
    check(info.memory, "It reports no memory.")
    check((info.context_length or 0) > 0, f"The context length is {info.context_length}.")
    check((info.max_running or 0) > 0, f"It runs {info.max_running} requests at once.")
    check(info.format == "none" or info.size > 0, "It reports no size.")


@case("W22 W23", task=None)
async def other_tasks_are_refused(subject: Subject) -> None:
    """Requests for other tasks are refused by a typed error."""
    tasks, backend = subject.capabilities.tasks, subject.backend
    if "generate" not in tasks:
        await refusal(backend.ask(GenerateRequest(prompt="hello")), Unsupported)
    if "embed" not in tasks:
        await _refused(subject, EmbedRequest(inputs=("hello",)))
    if "rerank" not in tasks:
        await _refused(subject, RerankRequest(query="hello", documents=("world",)))


async def _refused(subject: Subject, request: EmbedRequest | RerankRequest) -> None:
    backend = subject.backend
    try:
        if isinstance(request, EmbedRequest):
            await collect_vectors(backend.ask(request))
        else:
            await collect_ranking(backend.ask(request))
    except HeadraceError as error:
        kind = f"{type(error).__name__}: {error.message}"
        check(isinstance(error, Unsupported), f"It is refused as {kind}.")
        return
    check(False, f"A {type(request).__name__} is answered.")


CASES = (
    is_known,
    is_read_without_its_library,
    options_describe_themselves,
    metadata_is_complete,
    other_tasks_are_refused,
)
