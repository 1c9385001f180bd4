"""The part of xllamacpp that is used here; the library comes without types."""

from collections.abc import Callable
from typing import Any

class CommonParams:
    """Takes any attribute that llama.cpp's own `common_params` has."""

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...

class CommonAdapterLoraInfo:
    """A LoRA adapter: its file, and its scale where a request names none."""

    def __init__(self, path: str = "", scale: float = 1.0) -> None: ...

class Server:
    """One loaded model and its slots."""

    def __init__(self, params: CommonParams) -> None: ...
    def handle_completions(
        self, request: bytes, callback: Callable[[bytes], bool] | None = None
    ) -> Any: ...
    def handle_embeddings(self, request: dict[str, Any]) -> dict[str, Any]: ...
    def handle_rerank(self, request: dict[str, Any]) -> dict[str, Any]: ...

def get_device_info() -> list[dict[str, Any]]: ...
