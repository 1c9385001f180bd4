"""Numpy comes with the engines that need it; checks do not need it installed."""

from typing import Any

def __getattr__(name: str) -> Any: ...
