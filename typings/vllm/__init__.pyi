"""The part of vLLM that is used here; checks do not need it installed."""

from typing import Any

def __getattr__(name: str) -> Any: ...
