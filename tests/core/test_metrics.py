"""A figure is declared once; what follows from the declarations."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.conftest import ROOT

from headrace.core import metrics
from headrace.core.metrics import (
    DeviceUse,
    Figures,
    Gaps,
    InferenceMetrics,
    Usage,
    percentile,
)

PAGE = ROOT / "docs" / "figures.md"
MARKED = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- /figures -->)", re.DOTALL)
PARTS = {"usage": ("usage.", Usage), "inter_token_ms": ("inter_token_ms.", Gaps),
         "devices": ("devices[].", DeviceUse)}  # fmt: skip
TOGETHER = {
    max: "longest",
    min: "earliest",
    sum: "sum",
    metrics._first: "first",
    metrics._first_given: "first",
    metrics._mean: "mean",
    metrics._whole_mean: "mean",
    metrics._undefined: "null",
}


def use(name: str, mean: int, peak: int | None = None, **given: Any) -> DeviceUse:
    peak = mean + 1 if peak is None else peak
    return DeviceUse(
        name=name, total=99, used=9, worker_used=5, worker_mean=mean, worker_peak=peak, **given
    )


@pytest.mark.parametrize("kind", Figures.__subclasses__())
def test_each_field_is_declared(kind: type[Figures]) -> None:
    """W16: with its unit, its definition and how several are merged."""
    for name, figure in kind.declared().items():
        assert figure.help.endswith("."), name
        assert (figure.unit == "ms") == name.endswith(("_ms", "p50", "p99", "max")), name
    assert kind.declared().keys() == set(kind.__struct_fields__)


def test_figures_of_several_requests_together() -> None:
    """W16: by hand; none is dropped, and what would mix them is null."""
    first = InferenceMetrics(
        started_at=5.0,
        queue_ms=1.0,
        load_ms=10.0,
        time_to_first_token_ms=40.0,
        prefill_ms=3.0,
        decode_tokens_per_second=100.0,
        inter_token_ms=Gaps(p50=1, p99=2, max=3),
        total_ms=90.0,
        chunks=3,
        usage=Usage(prompt_tokens=5, cached_tokens=1, completion_tokens=3, reasoning_tokens=1),
        devices=(use("cpu", 4, busy_mean=0.5, busy_peak=0.6), use("cuda:0", 8, joules=2.0)),
        engine="echo",
        worker="w",
        model="m",
        outcome="stop",
    )
    second = InferenceMetrics(
        started_at=4.0,
        queue_ms=7.0,
        time_to_first_token_ms=20.0,
        decode_tokens_per_second=50.0,
        total_ms=80.0,
        chunks=4,
        usage=Usage(prompt_tokens=6, completion_tokens=4),
        devices=(use("cpu", 7, busy_mean=0.1, busy_peak=0.2), use("cuda:0", 2, joules=3.0)),
        engine="other",
        outcome="length",
        continuations=1,
        continued="fast",
    )
    assert InferenceMetrics.merged([first, second]) == InferenceMetrics(
        started_at=4.0,
        queue_ms=7.0,
        load_ms=10.0,
        time_to_first_token_ms=20.0,
        total_ms=90.0,
        chunks=7,
        usage=Usage(prompt_tokens=11, cached_tokens=1, completion_tokens=7, reasoning_tokens=1),
        devices=(
            use("cpu", 5, peak=8, busy_mean=pytest.approx(0.3), busy_peak=0.6),
            use("cuda:0", 5, peak=9, joules=5.0),
        ),
        engine="echo",
        worker="w",
        model="m",
        outcome="stop",
        continuations=1,
        continued="fast",
    )
    assert InferenceMetrics.merged([first]) is first


def test_a_figure_that_only_one_has_is_kept() -> None:
    without = InferenceMetrics(started_at=1.0)
    having = InferenceMetrics(started_at=2.0, queue_ms=3.0, devices=(use("cpu", 1),))
    both = InferenceMetrics.merged([without, having])
    assert (both.queue_ms, both.time_to_first_token_ms) == (3.0, None)
    assert both.devices == having.devices


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert [percentile([7.0], percent) for percent in (1, 50, 100)] == [7, 7, 7]
    assert percentile([1.0, 2.0, 3.0], 50) == 2


def rows(kind: type[Figures], prefix: str = "") -> Iterator[str]:
    """The rows of the table, those of a part in the place of it."""
    for name, figure in kind.declared().items():
        if name in PARTS:
            yield from rows(PARTS[name][1], PARTS[name][0])
        else:
            together = TOGETHER[figure.merge]
            if figure.unit != "ms" and figure.merge is max:
                together = "largest"
            yield f"| `{prefix}{name}` | {figure.unit} | {figure.help} | {together} |\n"


def test_the_page_defines_all_figures() -> None:
    """W16: `UPDATE_DOCS=1` writes the table."""
    text = PAGE.read_text(encoding="utf-8")
    assert MARKED.search(text), f"{PAGE.name} has no <!-- figures --> and <!-- /figures -->"
    head = "\n| figure | unit | definition | of several prompts |\n|---|---|---|---|\n"
    table = head + "".join(rows(InferenceMetrics)) + "\n"
    expected = MARKED.sub(lambda _: table, text)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected, "UPDATE_DOCS=1 scripts/test tests/core/test_metrics.py"
