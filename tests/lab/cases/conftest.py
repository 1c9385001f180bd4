from __future__ import annotations

from typing import Any, cast

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow suite what a sample does not need in each run."""
    for item in items:
        params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "opened" not in params:
            continue
        (sample, kind), case = params["opened"], cast("Any", params["case"])
        if not sample.is_quick(kind, case.name):
            item.add_marker(pytest.mark.slow)
