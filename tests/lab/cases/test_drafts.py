"""Issue 17.3: an engine whose drafts are not checked, or not counted, is caught by the cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab.cases.test_markov import SETTINGS, install

from headrace import contract, runtime
from headrace.lab.cases import drafts

DRAFTING = """\
import asyncio
from contextlib import aclosing

import msgspec

from headrace.engines import echo
from headrace.engines.base import About, RawDelta, RawDraft

ABOUT = About(formats=("none",), automatic=False)
Options = echo.Options


def upper(event):
    return RawDelta(event.data.upper(), tuple(event.data.upper()), event.logprobs)


class Engine(echo.Engine):
    def __init__(self, request):
        super().__init__(request)
        self._slots = asyncio.Semaphore(4)

    async def generate(self, request):
        await self._slots.acquire()
        drafts = self._options.drafts
        changed = request
        try:
            async with aclosing(super().generate(changed)) as events:
                async for event in events:
                    yield event
        finally:
            self._slots.release()
"""
"""An engine with four slots, of whose drafts all tokens are right."""

FAULTS = {
    "unchecked": (
        *("speculation_keeps_the_text", "yield event\n"),
        "yield upper(event) if drafts and isinstance(event, RawDelta) else event\n",
    ),
    "uncounted": (
        *("speculation_keeps_the_text", "yield event\n"),
        "if not isinstance(event, RawDraft): yield event\n",
    ),
    "overcounted": (
        *("speculation_keeps_the_text", "yield event\n"),
        "yield RawDraft(event.drafted, 99) if isinstance(event, RawDraft) else event\n",
    ),
    "overrun": (
        *("speculation_ends_exactly", "changed = request\n"),
        "changed = msgspec.structs.replace(request, max_tokens=request.max_tokens + 8 * drafts)\n",
    ),
    "slot kept": (
        *("speculation_is_cancelled", "    finally:\n            self._slots.release()"),
        "    except GeneratorExit:\n            raise\n"
        "        else:\n            self._slots.release()",
    ),
    "no log probabilities": (
        *("speculation_and_constraints", "yield event\n"),
        "yield msgspec.structs.replace(event, logprobs=event.logprobs[:1]) "
        "if drafts and isinstance(event, RawDelta) else event\n",
    ),
}


async def examined(name: str, code: str, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the results of the cases of speculation on an engine of this code."""
    install(name, code, folder, patch)
    settings = runtime.load_settings()
    spec = settings.model_spec("builtin:echo", {"engine": name, **SETTINGS})
    async with contract.opened(name, spec, settings, "worker") as subject:
        outcomes = [await contract.examine(case, subject, 2.0) for case in drafts.CASES]
    return {outcome.case: outcome.result for outcome in outcomes}


async def test_the_engine_that_is_spoiled_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    results = await examined("drafting", DRAFTING, tmp_path, monkeypatch)
    assert set(results.values()) == {"ok"}, results


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_of_drafts_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    case, before, after = FAULTS[fault]
    assert before in DRAFTING
    name = f"drafting_{fault.replace(' ', '_')}"
    results = await examined(name, DRAFTING.replace(before, after), tmp_path, monkeypatch)
    assert results[case] == "failed"
