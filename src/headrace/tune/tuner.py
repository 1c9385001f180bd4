"""One run: who takes part, who is right, who is fast; in turns, so that a busy time hits all."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import engines
from headrace.core.errors import ConfigError, LoadFailed, Unsupported
from headrace.core.model import ModelFile, ModelSpec
from headrace.engines.base import OpenRequest
from headrace.tune import limits, record
from headrace.tune.agreement import Reference
from headrace.tune.contender import Contender, contender
from headrace.tune.measure import Shape
from headrace.tune.record import Record
from headrace.worker.spec import OnProgress, Resolve

_CONTEXT = 1024
_HOPELESS = 0.6
"""Who has less than this of the best, at each number of streams, is not measured again."""
_REFERENCES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gguf": ("llamacpp", {"kv_type": "bf16", "flash_attention": "on"}),
    "safetensors": ("transformers", {"dtype": "float32"}),
}
"""Who is right about a format, and with which options."""


class Tuner:
    """Measures the engines that could run a model. `budgets` are bytes by device."""

    def __init__(
        self,
        spec: ModelSpec,
        file: ModelFile,
        resolve: Resolve,
        *,
        home: Path,
        budgets: dict[str, int],
        shape: Shape,
    ) -> None:
        context = spec.context_length or min(file.context_length or _CONTEXT, _CONTEXT)
        self._spec = msgspec.structs.replace(spec, context_length=context)
        self._file = file
        self._resolve = resolve
        self._home = home
        self._budgets = budgets
        self._shape = shape

    def __repr__(self) -> str:
        """Tell the model."""
        return f"<Tuner {self._spec.name}>"

    async def run(self, wanted: Sequence[str], report: OnProgress) -> Record:
        """Measure the engines that are wanted, or all that could run the model; keep the result.

        Raises:
            ConfigError: an engine is unknown, or nothing can run the model.
            Unsupported: the model does not generate.
        """
        task = self._spec.task or self._file.task
        if task != "generate":
            raise Unsupported(f"tune measures what generates; {self._spec.name} is to {task}.")
        field = list(self._field(wanted or self._engines()))
        report("measuring the memory", 0, 0)
        bandwidth = await asyncio.to_thread(limits.bandwidth, self._home)
        try:
            reference, who = await self._reference(field, report)
            await self._judge(field, reference, report)
            await self._rounds(field, report)
        finally:
            for one in field:
                await one.aclose()
        # What a GPU's memory can do is not measured.
        on_cpu = all(set(one.memory) <= {"cpu"} for one in field)
        trials = [one.trial(bandwidth if on_cpu else None, self._shape.tokens) for one in field]
        found = Record(
            model=self._spec.name,
            source=self._spec.model,
            day=datetime.datetime.now(datetime.UTC).date().isoformat(),
            machine=record.machine_id(),
            bandwidth=bandwidth,
            reference=who,
            context_length=self._spec.context_length,
            streams=self._shape.streams,
            trials=tuple(trials),
        )
        await asyncio.to_thread(record.save, self._home, self._file, found)
        return found

    def _engines(self) -> list[str]:
        names = [
            name
            for name in engines.names()
            if self._file.format in (about := engines.about(name)).formats
            and about.automatic
            and not about.remote
            and "generate" in about.tasks
            and engines.status(name).available
        ]
        if not names:
            raise ConfigError(f"No engine here runs a model in the format {self._file.format}.")
        return names

    def _field(self, names: Sequence[str]) -> Iterator[Contender]:
        most = max(self._shape.streams)
        request = OpenRequest(
            model=self._file,
            device=self._spec.device or "auto",
            context_length=self._spec.context_length,
            max_running=most,
        )
        for name in names:
            engines.choose(self._file, name)
            seen: list[dict[str, Any]] = []
            for options in ({}, *engines.tune_options(name, request)):
                one = contender(self._spec, name, options, self._resolve, most)
                if one.spec.options not in seen:
                    seen.append(one.spec.options)
                    yield one

    async def _reference(
        self, field: Sequence[Contender], report: OnProgress
    ) -> tuple[Reference, str]:
        name, options = _REFERENCES.get(self._file.format, (field[0].engine, {}))
        if not engines.status(name).available:
            name, options = field[0].engine, {}
        right = contender(self._spec, name, options, self._resolve, 1)
        report("asking the reference", 0, 0)
        async with right.loaded(keep=False) as worker:
            said = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
            return await Reference.ask(worker), said

    async def _judge(
        self, field: Sequence[Contender], reference: Reference, report: OnProgress
    ) -> None:
        held = 0
        for number, one in enumerate(field):
            report("comparing answers", 100 * number // len(field), 100)
            await one.prepare(self._file, self._home, self._budgets, report)
            if one.fault is None:
                keep = held < min(self._budgets.values()) // 3
                memory = await one.judge(reference, keep=keep)
                held += max(memory.values(), default=0) if keep else 0
        report("comparing answers", 100, 100)
        if not any(one.agreement and one.fault is None for one in field):
            faults = "; ".join(f"{one.engine}: {one.fault}" for one in field)
            raise LoadFailed(f"None of them can be chosen: {faults}.")

    async def _rounds(self, field: Sequence[Contender], report: OnProgress) -> None:
        left = [one for one in field if one.agreement is not None]
        for number in range(self._shape.rounds):
            what = f"round {number + 1} of {self._shape.rounds}"
            # Every other round the other way: who comes first has no advantage.
            for place, one in enumerate(left if number % 2 == 0 else left[::-1]):
                report(what, 100 * place // len(left), 100)
                await one.measure(self._shape, number, keep=one.is_loaded)
            report(what, 100, 100)
            left = _promising(left, self._shape.streams)


def _promising(left: Sequence[Contender], streams: Sequence[int]) -> list[Contender]:
    """Return who agrees and could still win."""
    right = [one for one in left if one.fault is None]
    best = {n: max((one.rate(n) for one in right), default=0.0) for n in streams}
    return [one for one in right if any(one.rate(n) >= _HOPELESS * best[n] for n in streams)]
