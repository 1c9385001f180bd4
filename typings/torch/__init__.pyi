"""The part of torch that is used here; checks do not need it installed."""

from typing import Any

Tensor = Any
dtype = Any

def __getattr__(name: str) -> Any: ...
