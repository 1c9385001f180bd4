"""One run of `headrace tune`: compares the engines, then measures them in turns.

The turns alternate, so that other load on the machine affects all engines.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import engines, machine, roofline, runtime
from headrace.config import Settings
from headrace.core.errors import ConfigError, LoadFailed, Unsupported
from headrace.core.model import ModelFile, ModelSpec
from headrace.engines import measured
from headrace.engines.base import OpenRequest
from headrace.engines.measured import Record
from headrace.lab.tune.agreement import Reference
from headrace.lab.tune.contender import Contender, make_contender
from headrace.lab.tune.measure import Shape
from headrace.worker.spec import OnProgress, Resolve

_CONTEXT = 1024
_HOPELESS = 0.6
"""Below this share of the best, at every number of streams, an engine is not measured again."""
_MORE_ROUNDS, _MORE_S = 5, 120.0
"""Rounds, and the seconds in which they start, of those that are nearly as fast as the best."""
_MOST_NEAR = 4
_REFERENCES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gguf": ("llamacpp", {"kv_type": "bf16", "flash_attention": "on"}),
    "safetensors": ("transformers", {"dtype": "float32"}),
}
"""The reference for a format: an engine with its most exact options."""


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
        """Show the model."""
        return f"<Tuner {self._spec.name}>"

    async def run(self, wanted: Sequence[str], report: OnProgress) -> Record:
        """Measure the engines in `wanted`, or all that could run the model; keep the result.

        Raises:
            ConfigError: an engine is unknown, or nothing can run the model.
            Unsupported: the model does not generate.
        """
        task = self._spec.task or self._file.task
        if task != "generate":
            raise Unsupported(f"tune measures generation; {self._spec.name} is to {task}.")
        field = list(self._field(wanted or self._engines()))
        report("measuring the memory", 0, 0)
        bandwidth = await asyncio.to_thread(roofline.bandwidth, self._home)
        try:
            reference, name = await self._reference(field, report)
            await self._judge(field, reference, report)
            await self._rounds(field, report)
            for streams in dict.fromkeys((min(self._shape.streams), max(self._shape.streams))):
                await self._near_ties(field, streams, report)
        finally:
            for contender in field:
                await contender.aclose()
        # The bandwidth of a GPU's memory is not measured.
        on_cpu = all(set(contender.memory) <= {"cpu"} for contender in field)
        known, tokens = bandwidth if on_cpu else None, self._shape.tokens
        result = Record(
            model=self._spec.name,
            source=self._spec.model,
            day=datetime.datetime.now(datetime.UTC).date().isoformat(),
            machine=measured.machine_id(),
            bandwidth=bandwidth,
            reference=name,
            context_length=self._spec.context_length,
            streams=self._shape.streams,
            trials=tuple(contender.trial(known, tokens) for contender in field),
        )
        await asyncio.to_thread(measured.save, self._home, self._file, result)
        return result

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
        streams = max(self._shape.streams)
        request = OpenRequest(
            model=self._file,
            device=self._spec.device or "auto",
            context_length=self._spec.context_length,
            max_running=streams,
        )
        for name in names:
            engines.choose(self._file, name)
            seen: list[dict[str, Any]] = []
            for options in ({}, *engines.tune_options(name, request)):
                variant = make_contender(self._spec, name, options, self._resolve, streams)
                if variant.spec.options not in seen:
                    seen.append(variant.spec.options)
                    yield variant

    async def _reference(
        self, field: Sequence[Contender], report: OnProgress
    ) -> tuple[Reference, str]:
        name, options = _REFERENCES.get(self._file.format, (field[0].engine, {}))
        if not engines.status(name).available:
            name, options = field[0].engine, {}
        right = make_contender(self._spec, name, options, self._resolve, 1)
        report("asking the reference", 0, 0)
        async with right.loaded(keep=False) as worker:
            words = [name, *(f"{key}={value}" for key, value in options.items())]
            return await Reference.ask(worker), " ".join(words)

    async def _judge(
        self, field: Sequence[Contender], reference: Reference, report: OnProgress
    ) -> None:
        held = 0
        for number, contender in enumerate(field):
            report("comparing answers", 100 * number // len(field), 100)
            await contender.prepare(self._file, self._home, self._budgets, report)
            if contender.fault is None:
                keep = held < min(self._budgets.values()) // 3
                memory = await contender.judge(reference, keep=keep)
                held += max(memory.values(), default=0) if keep else 0
        report("comparing answers", 100, 100)
        if not any(contender.agreement and contender.fault is None for contender in field):
            faults = "; ".join(f"{contender.engine}: {contender.fault}" for contender in field)
            raise LoadFailed(f"None of them can be chosen: {faults}.")

    async def _rounds(self, field: Sequence[Contender], report: OnProgress) -> None:
        left = [contender for contender in field if contender.agreement is not None]
        for number in range(self._shape.rounds):
            label = f"round {number + 1} of {self._shape.rounds}"
            # Every other round is reversed, so that no engine is always the first.
            for place, contender in enumerate(left if number % 2 == 0 else left[::-1]):
                report(label, 100 * place // len(left), 100)
                await contender.measure(self._shape, number, keep=contender.is_loaded)
            report(label, 100, 100)
            left = _promising(left, self._shape.streams)

    async def _near_ties(
        self, field: Sequence[Contender], streams: int, report: OnProgress
    ) -> None:
        """Measure again, in turns, what is nearly as fast as the best, until it is decided."""
        near = nearly_best(field, streams)
        shape = msgspec.structs.replace(self._shape, streams=(streams,))
        began, first = time.monotonic(), self._shape.rounds
        for number in range(first, first + _MORE_ROUNDS):
            if _is_decided(near, streams) or time.monotonic() - began > _MORE_S:
                return
            report(f"near ties at {streams}", 100 * (number - first) // _MORE_ROUNDS, 100)
            for contender in near if number % 2 == 0 else near[::-1]:
                await contender.measure(shape, number, keep=contender.is_loaded)


def nearly_best(field: Sequence[Contender], streams: int) -> list[Contender]:
    """Return the fastest that agrees, and those that are nearly as fast and take less memory."""
    right = [c for c in field if c.fault is None and c.agreement and c.rate(streams)]
    right.sort(key=lambda contender: contender.rate(streams), reverse=True)
    least = measured.NEAR * right[0].rate(streams) if right else 0.0
    most = sum(right[0].memory.values()) if right else 0
    smaller = [contender for contender in right[1:] if sum(contender.memory.values()) < most]
    near = [contender for contender in smaller if contender.rate(streams) >= least]
    return [*right[:1], *near][:_MOST_NEAR]


def _is_decided(near: Sequence[Contender], streams: int) -> bool:
    """Whether all but the first are slower by enough rounds, or failed."""
    rates = [contender.rates(streams) for contender in near if contender.fault is None]
    if len(rates) < 2:
        return True
    enough = all(len(each) >= measured.LEAST_PAIRS for each in rates)
    return enough and all(measured.is_slower(each, rates[0]) for each in rates[1:])


def _promising(left: Sequence[Contender], streams: Sequence[int]) -> list[Contender]:
    """Return the engines that agree and could still win."""
    right = [contender for contender in left if contender.fault is None]
    best = {n: max((contender.rate(n) for contender in right), default=0.0) for n in streams}
    return [
        contender
        for contender in right
        if any(contender.rate(n) >= _HOPELESS * best[n] for n in streams)
    ]


async def tune(
    settings: Settings,
    spec: ModelSpec,
    shape: Shape,
    wanted: Sequence[str],
    on_progress: OnProgress,
) -> Record:
    """Measure the engines that could run a model here, and keep the result.

    Raises:
        ConfigError: an engine is unknown or not installed.
        HeadraceError: the model cannot be obtained, or no engine runs it.
    """
    config = settings.config
    file = await asyncio.to_thread(runtime.model_file, spec, config, on_progress)
    budgets = machine.budgets(config.server.memory, machine.devices())
    resolve = runtime.resolver(config)
    tuner = Tuner(spec, file, resolve, home=config.home, budgets=budgets, shape=shape)
    return await tuner.run(wanted, on_progress)
