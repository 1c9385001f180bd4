"""What can be asked of a Backend. Requests are frozen: nobody on the way changes them."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

import msgspec

from headrace.core.errors import InvalidRequest
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.sampling import Sampling

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation. Content in parts has been joined to text before it gets here."""

    role: Role
    content: str
    name: str | None = None


def new_id() -> str:
    """Return an unguessable id for a request."""
    return secrets.token_hex(12)


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Messages or a prompt (text or token ids), never both.

    `received` is monotonic seconds; the clock is one for all processes of the machine.
    `deadline_s` counts from `received`. `load_ms` is what the request already waited for its
    model. `context_length` may ask for less than the model has, never for more.
    `json_schema` constrains the text; `{}` means any JSON.

    `client` is who asks, for fairness between them. `keep_alive` is the model's, in seconds, from
    the end of this request on. `load_wait_s` is how long to wait for the model's load; None is as
    long as it takes. `answered` are the tokens of an answer that was cut off: the stream begins
    with their text, in one delta, and goes on from there.

    `traceparent` and `tracestate` are the W3C context of the caller's span; each layer that makes
    a span hands on its own.
    """

    model: str = ""
    messages: tuple[Message, ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    sampling: Sampling = Sampling()
    n: int = 1
    echo: bool = False
    context_length: int | None = None
    json_schema: dict[str, Any] | None = None
    template_options: dict[str, Any] = {}
    deadline_s: float | None = None
    load_ms: float = 0.0
    client: str = ""
    keep_alive: float | None = None
    load_wait_s: float | None = None
    answered: tuple[int, ...] = ()
    traceparent: str = ""
    tracestate: str = ""
    id: str = msgspec.field(default_factory=new_id)
    received: float = msgspec.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Refuse what no engine could answer.

        Raises:
            InvalidRequest: messages and prompt are both given or both missing, or one is empty.
        """
        if (self.messages is None) == (self.prompt is None):
            raise InvalidRequest("Give either messages or a prompt.", param="messages")
        if self.messages is not None and not self.messages:
            raise InvalidRequest("messages is empty.", param="messages")
        if isinstance(self.prompt, tuple) and not self.prompt:
            raise InvalidRequest("prompt is an empty list of tokens.", param="prompt")
        if self.n < 1:
            raise InvalidRequest("n is at least 1.", param="n")


class CountRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Text, or messages that go through the model's template, to be counted as tokens.

    `add_special` adds what the model's tokenizer puts around a text (BOS and the like).
    """

    model: str = ""
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    add_special: bool = False
    template_options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Refuse what cannot be counted.

        Raises:
            InvalidRequest: a text and messages are both given or both missing, or none are in it.
        """
        if (self.messages is None) == (self.text is None):
            raise InvalidRequest("Give either messages or a text.", param="messages")
        if self.messages is not None and not self.messages:
            raise InvalidRequest("messages is empty.", param="messages")


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Texts, or lists of token ids, each to become one vector.

    `dimensions` keeps that many of the first, for models that are made for it. `normalize` scales
    each vector to length 1. `truncate` cuts what is longer than the context; it is refused without.
    Other fields are as in GenerateRequest.
    """

    inputs: tuple[str | tuple[int, ...], ...]
    model: str = ""
    dimensions: int | None = None
    normalize: bool = True
    truncate: bool = False
    deadline_s: float | None = None
    client: str = ""
    keep_alive: float | None = None
    load_wait_s: float | None = None
    load_ms: float = 0.0
    traceparent: str = ""
    tracestate: str = ""
    id: str = msgspec.field(default_factory=new_id)
    received: float = msgspec.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Refuse what has no vector.

        Raises:
            InvalidRequest: there is no input, or one is empty.
        """
        if not self.inputs or not all(self.inputs):
            raise InvalidRequest("An input is empty.", param="input")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest("dimensions is at least 1.", param="dimensions")


class EmbedResult(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in order: little-endian 32-bit floats."""

    vectors: tuple[bytes, ...]
    dimensions: int
    usage: Usage
    metrics: InferenceMetrics


class RerankRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Documents to be put in the order in which they answer the query.

    `top_n` keeps that many of the best. `truncate` cuts documents that do not fit into the context
    with the query; they are refused without. Other fields are as in GenerateRequest.
    """

    query: str
    documents: tuple[str, ...]
    model: str = ""
    top_n: int | None = None
    truncate: bool = True
    deadline_s: float | None = None
    client: str = ""
    keep_alive: float | None = None
    load_wait_s: float | None = None
    load_ms: float = 0.0
    traceparent: str = ""
    tracestate: str = ""
    id: str = msgspec.field(default_factory=new_id)
    received: float = msgspec.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Refuse what has no order.

        Raises:
            InvalidRequest: the query is empty, or there are no documents.
        """
        if not self.query:
            raise InvalidRequest("query is empty.", param="query")
        if not self.documents:
            raise InvalidRequest("documents is empty.", param="documents")
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequest("top_n is at least 1.", param="top_n")


class Ranked(msgspec.Struct, frozen=True, array_like=True):
    """How well document `index` answers the query; a higher score is better."""

    index: int
    score: float


class RerankResult(msgspec.Struct, frozen=True, kw_only=True):
    """The best documents, best first."""

    ranking: tuple[Ranked, ...]
    usage: Usage
    metrics: InferenceMetrics


class TokenCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many tokens, and which, where the engine can tell. `estimated` marks a guess."""

    count: int
    token_ids: tuple[int, ...] | None = None
    estimated: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids to be turned into text."""

    token_ids: tuple[int, ...]
    model: str = ""
