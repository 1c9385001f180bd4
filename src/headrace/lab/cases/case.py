"""A case of the contract, and its outcome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from headrace.core.errors import HeadraceError
from headrace.core.model import Task
from headrace.lab.cases.subject import Broken, Declared, Subject

Result = Literal["ok", "refused", "reported", "failed"]
Run = Callable[[Subject], Awaitable[str | None]]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A requirement on every engine. `rows` are those of the contract that it checks.

    `run` returns None, or a remark that is reported although it is no fault. `task` is that of the
    models that it applies to; None is any.
    """

    name: str
    rows: str
    about: str
    run: Run
    task: Task | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a case.

    `refused`: the engine declares that it cannot do this, and refuses it by name. `reported`: it
    declares that this does not always hold, and it did not. `seconds` is the duration.
    """

    case: str
    rows: str
    about: str
    result: Result
    why: str = ""
    seconds: float = 0.0


def case(rows: str, *, task: Task | None = "generate") -> Callable[[Run], Case]:
    """Make a case of a function, with its name and the first line of its docstring."""

    def make(run: Run) -> Case:
        about = (run.__doc__ or "").partition("\n")[0]
        return Case(name=getattr(run, "__name__", ""), rows=rows, about=about, run=run, task=task)

    return make


def concerns(case: Case, subject: Subject) -> bool:
    """Return whether the case applies to the task of this model."""
    return case.task is None or case.task in subject.capabilities.tasks


async def examine(case: Case, subject: Subject, limit_s: float = 300.0) -> Outcome:
    """Run a case; after `limit_s` it has failed. Only a cancellation is raised."""
    began = time.monotonic()
    result, why = await _run(case, subject, limit_s)
    return Outcome(
        case=case.name,
        rows=case.rows,
        about=case.about,
        result=result,
        why=why,
        seconds=round(time.monotonic() - began, 3),
    )


async def _run(case: Case, subject: Subject, limit_s: float) -> tuple[Result, str]:
    try:
        async with asyncio.timeout(limit_s):
            remark = await case.run(subject)
    except Declared as declared:
        return "refused", str(declared)
    except Broken as broken:
        return "failed", str(broken)
    except HeadraceError as error:
        detail = f" ({error.detail})" if error.detail else ""
        return "failed", f"{type(error).__name__}: {error.message}{detail}"
    except TimeoutError:
        return "failed", f"It took more than {limit_s:g} s."
    except Exception as error:  # noqa: BLE001 - an engine's own error instead of a typed one
        return "failed", f"an untyped {type(error).__name__}: {error}"
    return ("reported", remark) if remark else ("ok", "")
