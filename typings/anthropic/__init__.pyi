"""What of the library is used here."""

from typing import Any

def __getattr__(name: str) -> Any: ...
