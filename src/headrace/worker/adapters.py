"""The adapters of a loaded model: which of them requests may name, and how they change."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Generator, Sequence

import msgspec

from headrace.core.adapter import AdapterFile, check_known
from headrace.core.errors import HeadraceError, LoadFailed, Unsupported
from headrace.engines.abilities import AdapterSwitch
from headrace.engines.base import Engine


class Adapters:
    """The adapters of an engine. One that was replaced or removed stays until no request has it.

    The engine has a name of its own for each that is loaded, so that what is cached of a prompt is
    never that of another adapter which had this name before.
    """

    def __init__(self, files: Sequence[AdapterFile], engine: Engine) -> None:
        self._engine = engine
        self._files = {file.name: file for file in files}
        self._loaded = {file.name: file.name for file in files}
        self._known = set(self._loaded)
        self._numbers = itertools.count(2)
        self._uses = Counter[str]()
        self._leaving = set[str]()
        self._changing = asyncio.Lock()
        self._freeing = set[asyncio.Task[None]]()

    def __repr__(self) -> str:
        """Describe the names, and what is kept for running requests."""
        return f"<Adapters {', '.join(self._files) or 'none'}; {len(self._leaving)} leaving>"

    @contextlib.contextmanager
    def held(self, name: str) -> Generator[str]:
        """Keep an adapter for a request, and return the engine's name for it.

        Raises:
            UnknownModel: there is none of this name.
        """
        check_known(name, self._files)
        loaded = self._loaded.get(name, "")
        self._uses[loaded] += 1
        try:
            yield loaded
        finally:
            self._uses[loaded] -= 1
            if loaded in self._leaving:
                task = asyncio.ensure_future(self._free())
                self._freeing.add(task)
                task.add_done_callback(self._freeing.discard)

    async def change(self, files: Sequence[AdapterFile]) -> bool:
        """Change to these adapters; return False if that takes a new worker.

        Requests that run go on with what they have begun with. After an error nothing has changed.

        Raises:
            LoadFailed, OutOfMemory: one cannot be loaded.
        """
        engine = self._engine
        if not isinstance(engine, AdapterSwitch):
            return False
        async with self._changing:
            new = {file.name: self._named(file) for file in files if not self._has(file)}
            if not await _added(engine, tuple(new.values())):
                return False
            loaded = {
                file.name: new[file.name].name if file.name in new else self._loaded[file.name]
                for file in files
            }
            self._leaving |= {*self._loaded.values()} - {*loaded.values()}
            self._files, self._loaded = {file.name: file for file in files}, loaded
        await self._free()
        return True

    def _has(self, file: AdapterFile) -> bool:
        return self._files.get(file.name) == file

    def _named(self, file: AdapterFile) -> AdapterFile:
        name = file.name
        while name in self._known:
            name = f"{file.name} ({next(self._numbers)})"
        self._known.add(name)
        return msgspec.structs.replace(file, name=name)

    async def _free(self) -> None:
        async with self._changing:
            for name in [name for name in self._leaving if not self._uses[name]]:
                self._leaving.discard(name)
                if isinstance(self._engine, AdapterSwitch):
                    await self._engine.remove_adapter(name)


async def _added(engine: AdapterSwitch, files: Sequence[AdapterFile]) -> bool:
    """Add all, or none and return False."""
    added = list[str]()
    try:
        for file in files:
            await engine.add_adapter(file)
            added.append(file.name)
    except Exception as error:
        # Any exception of the library becomes a HeadraceError.
        for name in added:
            await engine.remove_adapter(name)
        if isinstance(error, Unsupported):
            return False
        if isinstance(error, HeadraceError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise LoadFailed("The engine could not load the adapter.", detail=reason) from error
    return True
