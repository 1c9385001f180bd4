"""The part of sentence-transformers that tests and benchmarks use."""

from typing import Any

class SentenceTransformer:
    """A model of embeddings."""

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None: ...
    def encode(self, inputs: list[str], **kwargs: Any) -> Any: ...

class CrossEncoder:
    """A model that scores pairs."""

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None: ...
    def predict(self, inputs: list[tuple[str, str]], **kwargs: Any) -> Any: ...
