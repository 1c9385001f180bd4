"""The part of openvino-tokenizers that is used here; it may not be installed."""

from typing import Any

def convert_tokenizer(tokenizer: Any, *, with_detokenizer: bool) -> tuple[Any, Any]: ...
