"""What a node reports: everything at first, then what has changed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
from tests.cluster.network import FakeNode
from tests.pool.rig import run

from headrace.cluster.reports import Reporter
from headrace.cluster.view import View
from headrace.cluster.wire import Pulse
from headrace.core.model import ModelInfo
from headrace.core.status import ModelStatus


class Changing(FakeNode):
    """The first `loaded` of its models are loaded, `busy` of these answer, and memory changes."""

    loaded = 0
    busy = 0
    changing = 0

    def __init__(self, name: str, models: Sequence[str]) -> None:
        super().__init__(name, models)
        self._ticks = itertools.count()

    def model_statuses(self) -> tuple[ModelStatus, ...]:
        tick = next(self._ticks)
        return tuple(
            msgspec.structs.replace(
                model,
                state="ready" if place < self.loaded else "created",
                running=(tick + place) % 3 + 1 if place < self.busy else 0,
                memory={"cpu": 1000 + (tick if place < self.changing else 0)},
            )
            for place, model in enumerate(super().model_statuses())
        )

    def models(self) -> Sequence[ModelInfo]:
        return [
            msgspec.structs.replace(info, memory=next(self._ticks)) for info in super().models()
        ]


def test_changes_are_reported_and_nothing_else() -> None:
    async def main() -> None:
        fake = Changing("a", ["m", "k"])
        reporter = Reporter(fake, fake, ("gpu",))
        view = View()
        view.join("a")
        _, status = reporter.beat()
        assert status is not None
        view.apply("a", reporter.whole())
        assert view.nodes["a"].labels == ("gpu",)
        assert reporter.beat() == ({}, None)
        # A state, at once; the metadata has not changed, and is not sent again.
        fake.loaded = 1
        _, status = reporter.beat()
        assert status is not None
        assert [report.status.id for report in status.models] == ["m"]
        assert status.models[0].infos is None
        view.apply("a", status)
        assert [node.name for node in view.ready("m")] == ["a"]
        assert view.nodes["a"].models["m"].infos
        # Requests, with a pulse.
        fake.busy = 1
        loads, status = reporter.beat()
        assert [*loads] == ["m"]
        assert status is None
        view.pulse("a", Pulse(loads))
        assert view.nodes["a"].models["m"].load > 0
        # A model that is not served any more.
        del fake.states["k"]
        _, status = reporter.beat()
        assert status is not None
        assert status.removed == ("k",)
        view.apply("a", status)
        assert view.model_of("k") is None
        # Draining.
        fake.draining = True
        _, status = reporter.beat()
        assert status is not None
        view.apply("a", status)
        assert view.ready("m") == view.serving("m") == []
        view.leave("a")
        assert view.model_of("m") == "m", "it stays known"

    run(main())


def test_memory_alone_is_reported_now_and_then() -> None:
    async def main() -> None:
        fake = Changing("a", ["m"])
        fake.loaded = fake.changing = 1
        reporter = Reporter(fake, fake, ())
        reporter.beat()
        reports = [reporter.beat()[1] is not None for _ in range(40)]
        assert 3 <= sum(reports) <= 5

    run(main())
