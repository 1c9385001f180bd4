"""Adapters of a worker: which of them the engine has, while requests use them (issue 17.4)."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from headrace.core.adapter import AdapterFile
from headrace.core.errors import LoadFailed, UnknownModel, Unsupported
from headrace.engines.base import Engine
from headrace.worker.adapters import Adapters


class Switch:
    """An engine that notes what it has; `refused` is raised for a path."""

    def __init__(self, *names: str) -> None:
        self.has = {name: name for name in names}
        self.refused: dict[str, Exception] = {}

    async def add_adapter(self, file: AdapterFile) -> None:
        await asyncio.sleep(0)
        if file.path in self.refused:
            raise self.refused[file.path]
        assert file.name not in self.has
        self.has[file.name] = file.path

    async def remove_adapter(self, name: str) -> None:
        await asyncio.sleep(0)
        del self.has[name]


def file(name: str, path: str = "", **given: Any) -> AdapterFile:
    return AdapterFile(name=name, path=path or name, format="gguf", rank=1, size=1, **given)


def opened(engine: object, *names: str) -> Adapters:
    return Adapters([file(name) for name in names], cast("Engine", engine))


async def test_one_that_is_used_stays_until_its_request_ends() -> None:
    """Issue 17.4: also beside the one that has its name now, and by a name that is never reused."""
    engine = Switch("a", "b")
    adapters = opened(engine, "a", "b")
    with adapters.held("a") as first:
        assert await adapters.change([file("a", "other"), file("b")])
        with adapters.held("a") as second:
            assert engine.has == {"a": "a", "b": "b", second: "other"}
            assert first != second
        assert await adapters.change([file("b")])
        assert engine.has == {"a": "a", "b": "b"}
        with pytest.raises(UnknownModel, match="no adapter 'a'; it has b"), adapters.held("a"):
            pass
    for _ in range(4):
        await asyncio.sleep(0)
    assert engine.has == {"b": "b"}
    assert await adapters.change([file("a"), file("b", scale=2.0)])
    with adapters.held("a") as third, adapters.held("b") as scaled:
        assert {first, second, third, "b"}.isdisjoint({scaled})
        assert third not in {first, second}


@pytest.mark.parametrize("error", [LoadFailed("bad"), ValueError("bad"), Unsupported("bad")])
async def test_after_a_refusal_nothing_has_changed(error: Exception) -> None:
    """Issue 17.4: whatever the library raises, and what was added before is gone."""
    engine = Switch("a")
    engine.refused["bad"] = error
    adapters = opened(engine, "a")
    change = adapters.change([file("new"), file("a", "bad")])
    if isinstance(error, Unsupported):
        assert not await change
    else:
        with pytest.raises(LoadFailed):
            await change
    assert engine.has == {"a": "a"}
    with adapters.held("a") as name:
        assert name == "a"
    with pytest.raises(UnknownModel), adapters.held("new"):
        pass


async def test_an_engine_that_cannot_switch() -> None:
    """Issue 17.4: its adapters are those that it was opened with."""
    adapters = opened(object(), "a")
    assert not await adapters.change([])
    with adapters.held("a") as name, adapters.held("") as none:
        assert (name, none) == ("a", "")
