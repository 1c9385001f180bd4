"""A plot of latency over throughput, with a line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.core.errors import ConfigError
from headrace.core.install import install_command
from headrace.lab.bench.record import Level, Run

_ENDINGS = (".png", ".svg", ".pdf")
_PANELS = (
    ("ttft_ms", "time to first token, ms"),
    ("inter_token_ms", "time between tokens, ms"),
)


def check(path: Path) -> None:
    """Check that a plot can be written to the path, before anything is measured.

    Raises:
        ConfigError: the ending is unknown, the folder does not exist, or matplotlib is missing.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise ConfigError(f"flag --plot: {path.name} does not end in {', '.join(_ENDINGS)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"flag --plot: there is no folder {path.parent}.")
    _figure()


def draw(runs: Mapping[str, Run], path: Path) -> None:
    """Draw runs by their name: the median as a line, the 99th percentile dashed.

    Raises:
        ConfigError: as `check`, or the file cannot be written.
    """
    check(path)
    figure = _figure()(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(
        "headrace bench: " + ", ".join(sorted({r.settings.model for r in runs.values()}))
    )
    legend: dict[str, Any] = {}
    for axes, (field, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            _line(axes, f"C{number}", name, field, run.levels)
        axes.set_title(label.partition(",")[0].capitalize(), fontsize="medium")
        axes.set_xlabel("output tokens/s")
        axes.set_ylabel(label)
        # The last point and its label are within the frame.
        axes.set_xlim(0, axes.get_xlim()[1] * 1.05)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
        axes.grid(visible=True, alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        legend |= zip(labels, handles, strict=True)
    # Below the panels it hides no point.
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"flag --plot: {path} cannot be written: {error.strerror}.") from None


def _line(axes: Any, colour: str, name: str, field: str, levels: Sequence[Level]) -> None:
    for percentile, style in (("p50", "o-"), ("p99", "o--")):
        points = [
            (level.output_tokens_per_s, getattr(getattr(level, field), percentile), level)
            for level in levels
            if getattr(level, field) is not None
        ]
        if not points:
            continue
        rates, times, loads = zip(*points, strict=True)
        axes.plot(rates, times, style, color=colour, markersize=4, label=f"{name}, {percentile}")
        for rate, value, level in zip(rates, times, loads, strict=True):
            if percentile == "p50":
                axes.annotate(str(level.load), (rate, value), fontsize="x-small", xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"flag --plot needs matplotlib: {install_command('bench')}", param="plot"
        ) from None
    return Figure
