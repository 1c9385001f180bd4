"""One run of `headrace tune`: who takes part, the reference, and the record of the result."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
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
from headrace.lab.tune.race import Clock, Race
from headrace.worker.spec import OnProgress, Resolve

_CONTEXT = 1024
_ASKED = 0.1
"""The share of the time that the reference's answers take, if fewer prompts are enough for that."""
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
        clock = Clock(self._shape.budget_s)
        report("measuring the memory", 0, 0)
        bandwidth = await asyncio.to_thread(roofline.bandwidth, self._home)
        try:
            reference, name = await self._reference(field, clock, report)
            await self._race(field, reference, clock, report)
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
            budget_s=self._shape.budget_s,
            seconds=clock.passed,
            trials=tuple(contender.trial(known, tokens) for contender in field),
        )
        await asyncio.to_thread(measured.save, self._home, self._file, result)
        return result

    async def _race(
        self, field: Sequence[Contender], reference: Reference, clock: Clock, report: OnProgress
    ) -> None:
        race = Race(field, self._shape, clock, min(self._budgets.values()) // 3, report)
        await race.first_turns(
            lambda contender: contender.prepare(self._file, self._home, self._budgets, report)
        )
        await race.rounds(reference)
        await race.near_ties()
        await race.between()
        race.leave_out()
        if not any(contender.agreement and contender.can_win for contender in field):
            faults = "; ".join(f"{each.engine}: {each.fault or each.left_out}" for each in field)
            raise LoadFailed(f"None of them can be chosen: {faults}.")

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
        """Yield the defaults of each engine, then the second set of options of each, and so on."""
        queues = [list(self._variants(name)) for name in names]
        for rank in zip_longest(*queues):
            yield from filter(None, rank)

    def _variants(self, name: str) -> Iterator[Contender]:
        streams = max(self._shape.streams)
        request = OpenRequest(
            model=self._file,
            device=self._spec.device or "auto",
            context_length=self._spec.context_length,
            max_running=streams,
        )
        engines.choose(self._file, name)
        seen: list[dict[str, Any]] = []
        for options in ({}, *engines.tune_options(name, request)):
            variant = make_contender(self._spec, name, options, self._resolve, streams)
            if variant.spec.options not in seen:
                seen.append(variant.spec.options)
                yield variant

    async def _reference(
        self, field: Sequence[Contender], clock: Clock, report: OnProgress
    ) -> tuple[Reference, str]:
        name, options = _REFERENCES.get(self._file.format, (field[0].engine, {}))
        if not engines.status(name).available:
            name, options = field[0].engine, {}
        right = make_contender(self._spec, name, options, self._resolve, 1)
        report("asking the reference", 0, 0)
        words = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        try:
            async with asyncio.timeout(clock.left), right.loaded(keep=False) as worker:
                return await Reference.ask(worker, clock.seconds * _ASKED), words
        except TimeoutError:
            seconds = f"{clock.seconds:g} s"
            raise LoadFailed(f"The reference, {words}, did not answer within {seconds}.") from None


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
