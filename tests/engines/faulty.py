"""llama.cpp with faults on demand, as the engine of a package that only tests know."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
from pydantic import Field

from headrace.engines import llamacpp
from headrace.engines.base import EngineRequest, OpenRequest, RawDelta, RawEvent
from headrace.engines.echo import Fault, misbehave, taken
from headrace.engines.llamacpp import ABOUT as ABOUT
from headrace.engines.llamacpp import engine

ROOT = Path(__file__).resolve().parents[2]
_OURS = {"trigger", "fault", "crash_signal"}


class Options(llamacpp.Options):
    """Those of llama.cpp, and the fault: as echo has it."""

    trigger: str | None = Field(None, description="A file; who finds it misbehaves.")
    fault: Fault = Field("raise", description="How.")
    crash_signal: int = Field(signal.SIGKILL, description="By which signal.")


class Engine(engine.Engine):
    """The first request that is about to yield a token, when the trigger is there, misbehaves."""

    def __init__(self, request: OpenRequest) -> None:
        self._faults = Options(**request.options)
        theirs = {name: value for name, value in request.options.items() if name not in _OURS}
        super().__init__(
            OpenRequest(
                model=request.model,
                device=request.device,
                context_length=request.context_length,
                max_running=request.max_running,
                memory=request.memory,
                repeatable=request.repeatable,
                options=theirs,
            )
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        raw, faults = super().generate(request), self._faults
        try:
            async for event in raw:
                if isinstance(event, RawDelta) and faults.trigger and taken(faults.trigger):
                    misbehave(faults.fault, faults.crash_signal)
                yield event
        finally:
            await raw.aclose()


def writes(request: OpenRequest) -> Sequence[Path]:
    """Return the folder of the trigger, which is removed."""
    trigger = Options(**request.options).trigger
    return (Path(trigger).parent,) if trigger else ()


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make it known as the engine `faulty`, here and in processes that are started from here."""
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[headrace.engines]\nfaulty = tests.engines.faulty\n")
    patch.syspath_prepend(str(folder))
    paths = (str(folder), str(ROOT), os.environ.get("PYTHONPATH", ""))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
