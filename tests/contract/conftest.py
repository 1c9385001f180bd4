from __future__ import annotations

from typing import Any, cast

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave sampling on a heavy engine behind its further Backends to the slow suite.

    How a field is honoured is the engine's; that all fields travel, the light engines show on every
    Backend, and this engine on its first.
    """
    for item in items:
        params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "opened" not in params:
            continue
        (sample, kind), case = params["opened"], cast("Any", params["case"])
        further = sample.heavy and kind != sample.kinds[0]
        if further and case.name.startswith("sampling_"):
            item.add_marker(pytest.mark.slow)
