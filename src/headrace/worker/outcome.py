"""How a task of another process's request has ended."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from typing import Any

from headrace.core.errors import ErrorRecord, HeadraceError, to_record


async def failure(work: Coroutine[Any, Any, None], log: logging.Logger) -> ErrorRecord | None:
    """Await `work` and return its error, of any kind, for the process that sent the request."""
    try:
        await work
    except HeadraceError as error:
        return to_record(error)
    except Exception as error:
        # A bug here or in a library: the other streams go on.
        log.exception("headrace.worker.bug")
        return to_record(error)
    return None
