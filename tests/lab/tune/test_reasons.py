"""Where the reason of a choice is told while a service runs."""

from __future__ import annotations

from headrace.cli.pool import status_text
from headrace.core.status import ModelStatus, PoolStatus


def test_ps_tells_why_when_asked() -> None:
    """Issue 4, Choice: the reason is shown by `show` and `ps`."""
    model = ModelStatus(
        id="m", source="x", state="ready", engine="echo", engine_reason="none\x1b[2J"
    )
    status = PoolStatus(models=(model,), devices=())
    assert "none" not in status_text(status, 0)
    assert status_text(status, 0, reasons=True).endswith("\nm: none[2J\n")
