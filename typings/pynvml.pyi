"""The part of nvidia-ml-py that is called by name; the rest goes through Any."""

from typing import Any

class NVMLError(Exception):
    """Any failure that the driver's library reports."""

def nvmlInit() -> None: ...  # noqa: N802
def __getattr__(name: str) -> Any: ...
