"""Two engines of one model: one needs a conversion; both are compared, measured and told of."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace import runtime
from headrace.lab.tune import agreement
from headrace.lab.tune.measure import Shape
from headrace.lab.tune.tuner import tune

pytestmark = [pytest.mark.engines, pytest.mark.slow]


async def test_openvino_is_converted_for_compared_and_measured(
    home: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 4, Choice: F16 weights of a Q4_1 file agree with it; the limit is of what is read."""
    monkeypatch.setattr(agreement, "PROMPTS", agreement.PROMPTS[:2])
    monkeypatch.setattr(agreement, "_ANSWER", 8)
    monkeypatch.setattr("headrace.engines.llamacpp.tune_options", lambda request: ())
    monkeypatch.setattr("headrace.engines.openvino.tune_options", lambda request: ())
    settings = runtime.load_settings()
    spec = settings.model_spec(str(smollm2_path))
    shape = Shape(streams=(1, 4), seconds=0, rounds=1, tokens=4)
    wanted = ("llamacpp", "openvino")
    found = await tune(settings, spec, shape, wanted, lambda what, done, total: None)
    llamacpp, right = found.trials
    assert llamacpp.fault is None
    assert llamacpp.precision == "Q4_1"
    assert (right.engine, right.precision, right.fault) == ("openvino", "F16", None)
    assert right.agreement is not None
    assert right.agreement.prompts == 1
    assert right.agreement.distance is not None
    assert right.rate(4) > 0
    reason = runtime.describe(spec, settings.config).engine_reason
    # Issue 12.18: what was measured is shown, and changes nothing.
    assert "tuned on" in reason
    assert runtime.describe(spec, settings.config).engine == "llamacpp"
