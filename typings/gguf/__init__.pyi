"""The part of gguf that is used here; it may not be installed."""

from typing import Any

def __getattr__(name: str) -> Any: ...
