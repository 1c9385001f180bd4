"""The requests to a Backend. They are immutable: a layer that changes one makes a copy.

Every request is a `Request`: the envelope, and the methods that the layers need of every kind.
A new kind is a class here, its event in `headrace.core.events`, the worker's answer in
`headrace.worker`, and a route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.envelope import Operation, Request
from headrace.core.errors import InvalidRequest
from headrace.core.events import ToolCall
from headrace.core.gap import Gap, LineLimits
from headrace.core.media import Content, Media, known_as, media_of, text_of
from headrace.core.model import InputType, Task
from headrace.core.sampling import LOGPROB_RANGE, TOKEN_RANGE, Logprobs, Sampling
from headrace.core.tools import Thinking, Tool, ToolChoice

Role = Literal["system", "developer", "user", "assistant", "tool"]
Text = str | tuple[int, ...]
"""A text, or its token ids."""

MAX_PROMPT_CANDIDATES = 1 << 19
"""Log probabilities of the prompts of one request: tokens, times what is reported of each."""

_ANSWER_TOKENS = 256
_CHARACTERS_PER_TOKEN = 4
_OPENING_TOKENS = 4096


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation. Content of texts alone has been joined to one text.

    An assistant's turn can have the calls that it made and its thinking, the turn of a tool has
    the id of the call that it answers.
    """

    role: Role
    content: Content = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str = ""


class GenerateRequest(Request, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Messages or a prompt (text or token ids), never both.

    `context_length` is at most that of the model. With `fit_max_tokens`, `max_tokens` is cut to
    what the context has left, which is refused otherwise. `constraint` is what the text has to be.
    `answered` are the tokens of an answer to continue: the stream begins with their text, in one
    delta. Tools and thinking go with messages only. `media` are the bytes of the pictures in the
    messages, by digest.

    `suffix` is what follows the gap that is filled after a prompt, and `gap` what else is known of
    it. `line_limits` end the answer to a prompt by its lines, as `length`. With `continue_final`
    the last message is an assistant's, and the answer goes on with it. `prompt_logprobs` is the
    number of candidates reported for each token of the prompt. `echo` puts the prompt before the
    answer, with the log probabilities of its tokens if `sampling.logprobs` is given. `max_tokens`
    may be 0 with these two only.

    Raises:
        InvalidRequest: messages and prompt are both given or both missing, or one is empty; the
            choice of tools contradicts the tools; no message can be continued; the bytes of an
            image are missing.
    """

    messages: tuple[Message, ...] | None = None
    prompt: Text | None = None
    sampling: Sampling = Sampling()
    n: int = 1
    echo: bool = False
    context_length: int | None = None
    fit_max_tokens: bool = False
    constraint: Constraint | None = None
    template_options: dict[str, Any] = {}  # noqa: RUF012 - of a msgspec struct, which copies it
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    thinking: Thinking = Thinking()
    answered: tuple[int, ...] = ()
    suffix: str | None = None
    continue_final: bool = False
    prompt_logprobs: Logprobs | None = None
    media: dict[str, bytes] = {}  # noqa: RUF012 - of a msgspec struct, which copies it
    gap: Gap | None = None
    line_limits: LineLimits | None = None

    content_fields: ClassVar[frozenset[str]] = frozenset(
        {"messages", "prompt", "suffix", "gap", "tools", "answered", "media"}
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        if (self.messages is None) == (self.prompt is None):
            raise InvalidRequest("Give either messages or a prompt.", param="messages")
        if self.messages is not None and not self.messages:
            raise InvalidRequest("messages is empty.", param="messages")
        if isinstance(self.prompt, tuple) and not self.prompt:
            raise InvalidRequest("prompt is an empty list of tokens.", param="prompt")
        if self.n < 1:
            raise InvalidRequest("n is at least 1.", param="n")
        if self.tools and self.messages is None:
            raise InvalidRequest("Tools go with messages, not with a prompt.", param="tools")
        self.tool_choice.allowed(self.tools)
        if any(part.digest not in self.media for part in self.media_parts):
            raise InvalidRequest("The bytes of an image or a sound are missing.", param="messages")
        if self.continue_final:
            _check_continued(self.messages)
        self._check_prompt()

    def _check_prompt(self) -> None:
        if self.suffix is not None and self.messages is not None:
            raise InvalidRequest("suffix goes with a prompt, not with messages.", param="suffix")
        if self.gap is not None and self.suffix is None:
            raise InvalidRequest("gap needs a suffix.", param="suffix")
        if self.line_limits is not None and self.messages is not None:
            raise InvalidRequest("line_limits go with a prompt.", param="line_limits")
        count = self.prompt_logprobs
        if count is not None and not LOGPROB_RANGE.includes(count):
            raise InvalidRequest(
                f"prompt_logprobs must be {LOGPROB_RANGE}.", param="prompt_logprobs"
            )
        if self.sampling.max_tokens == 0 and count is None and not self.echo:
            allowed = TOKEN_RANGE._replace(low=1)
            raise InvalidRequest(f"max_tokens must be {allowed}.", param="max_tokens")

    @property
    def media_parts(self) -> tuple[Media, ...]:
        """The pictures and sounds of the messages, in their order."""
        return tuple(part for turn in self.messages or () for part in media_of(turn.content))

    @property
    def prompt_candidates(self) -> int | None:
        """How many candidates are computed for each token of the prompt; None if none are wanted.

        Those of an echoed prompt are as many as those of the answer.
        """
        echoed = self.sampling.logprobs if self.echo else None
        both = (echoed, self.prompt_logprobs)
        return max((count for count in both if count is not None), default=None)

    @property
    def operation(self) -> Operation:
        """Chat or completion."""
        return "text_completion" if self.messages is None else "chat"

    @property
    def enforces_calls(self) -> bool:
        """Whether a grammar says what calls may be in the answer: beside a constraint, always."""
        choice = self.tool_choice
        tools = choice.allowed(self.tools)
        always = choice.mode == "required" or self.constraint is not None
        return bool(tools) and (always or any(tool.strict for tool in tools))

    @property
    def enforced_tools(self) -> dict[str, dict[str, Any]]:
        """The schemas, by name, of the tools whose arguments a grammar enforces."""
        choice = self.tool_choice
        return {
            tool.name: schema
            for tool in choice.allowed(self.tools)
            for schema in choice.enforced((tool,), tool.name)
        }

    @property
    def slots(self) -> int:
        """One for each choice."""
        return self.n

    def cost(self) -> float:
        """Return an estimate of the tokens of the prompt and all choices."""
        answer = self.sampling.max_tokens
        return self.prompt_cost() + (_ANSWER_TOKENS if answer is None else answer) * self.n

    def prompt_cost(self) -> float:
        """Return an estimate of the tokens of the prompt."""
        if self.messages is not None:
            return sum(map(_message_tokens, self.messages)) + sum(map(_tool_tokens, self.tools))
        gap = self.gap or Gap()
        texts = (self.prompt or (), self.suffix or "", gap.begun, *(o.text for o in gap.others))
        return sum(map(_tokens, texts))

    def opening(self) -> str:
        """Return the messages or the prompt as one text."""
        if self.messages is not None:
            return "\x1e".join(f"{turn.role}\x1f{known_as(turn.content)}" for turn in self.messages)
        if isinstance(self.prompt, str):
            return self.prompt
        return " ".join(map(str, (self.prompt or ())[:_OPENING_TOKENS]))

    def content(self) -> Any:
        """Return the messages, or the prompt if it is a text."""
        return msgspec.to_builtins(self.messages or _readable(self.prompt))


class CountRequest(Request, frozen=True, kw_only=True, omit_defaults=True, tag="count"):
    """Text, or messages that go through the model's template, to be counted as tokens.

    `add_special` adds what the model's tokenizer puts around a text (BOS and the like).
    `continue_final` is as for a GenerateRequest. With `as_text` the answer is the Text that the
    template makes of the messages.

    Raises:
        InvalidRequest: text and messages are both given or both missing, messages is empty, or
            none can be continued.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    add_special: bool = False
    template_options: dict[str, Any] = {}  # noqa: RUF012 - of a msgspec struct, which copies it
    tools: tuple[Tool, ...] = ()
    thinking: Thinking = Thinking()
    continue_final: bool = False
    as_text: bool = False

    queues: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if (self.messages is None) == (self.text is None):
            raise InvalidRequest("Give either messages or a text.", param="messages")
        if self.messages is not None and not self.messages:
            raise InvalidRequest("messages is empty.", param="messages")
        if self.as_text and self.messages is None:
            raise InvalidRequest("A template needs messages.", param="messages")
        if self.continue_final:
            _check_continued(self.messages)

    @property
    def operation(self) -> Operation:
        """Tokenize."""
        return "tokenize"


class DetokenizeRequest(Request, frozen=True, kw_only=True, omit_defaults=True, tag="detokenize"):
    """Token ids to be turned into text."""

    token_ids: tuple[int, ...]

    queues: ClassVar[bool] = False

    @property
    def operation(self) -> Operation:
        """Detokenize."""
        return "detokenize"


class EmbedRequest(Request, frozen=True, kw_only=True, omit_defaults=True, tag="embed"):
    """Texts, or lists of token ids, each to become one vector.

    `dimensions` keeps only the first ones, `normalize` scales vectors to length 1, and `truncate`
    cuts inputs to the context. `prompt_name`, or the purpose, chooses the prompt before each text.

    Raises:
        InvalidRequest: there is no input, or one is empty.
    """

    inputs: tuple[Text, ...]
    dimensions: int | None = None
    normalize: bool = True
    truncate: bool = False
    prompt_name: str | None = None
    input_type: InputType | None = None

    task: ClassVar[Task] = "embed"
    content_fields: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.inputs or not all(self.inputs):
            raise InvalidRequest("An input is empty.", param="input")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest("dimensions is at least 1.", param="dimensions")

    @property
    def operation(self) -> Operation:
        """Embeddings."""
        return "embeddings"

    def cost(self) -> float:
        """Return an estimate of the tokens of all inputs."""
        return sum(map(_tokens, self.inputs))

    def content(self) -> Any:
        """Return the inputs that are texts, None for the others."""
        return [_readable(text) for text in self.inputs]


class RerankRequest(Request, frozen=True, kw_only=True, omit_defaults=True, tag="rerank"):
    """Documents to be ranked by how well they answer the query.

    `top_n` keeps only the best. `truncate` cuts documents that do not fit into the context with
    the query, which are refused otherwise.

    Raises:
        InvalidRequest: the query is empty, or there are no documents.
    """

    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    truncate: bool = True

    task: ClassVar[Task] = "rerank"
    content_fields: ClassVar[frozenset[str]] = frozenset({"query", "documents"})

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.query:
            raise InvalidRequest("query is empty.", param="query")
        if not self.documents:
            raise InvalidRequest("documents is empty.", param="documents")
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequest("top_n is at least 1.", param="top_n")

    @property
    def operation(self) -> Operation:
        """Rerank."""
        return "rerank"

    def cost(self) -> float:
        """Return an estimate of the tokens of all pairs of the query and a document."""
        return _tokens(self.query) * len(self.documents) + sum(map(_tokens, self.documents))

    def content(self) -> Any:
        """Return the query and the documents."""
        return {"query": self.query, "documents": list(self.documents)}


class ScoreRequest(Request, frozen=True, kw_only=True, omit_defaults=True, tag="score"):
    """Pairs of texts, each to get a score of how well they go together.

    A model for rerank gives its own score; one for embeddings the cosine of the two vectors.
    `truncate` cuts what does not fit into the context.

    Raises:
        InvalidRequest: there is no pair, or a text is empty.
    """

    pairs: tuple[tuple[str, str], ...]
    truncate: bool = False

    task: ClassVar[Task] = "rerank"
    content_fields: ClassVar[frozenset[str]] = frozenset({"pairs"})

    def __post_init__(self) -> None:
        """Refuse what has no score."""
        if not self.pairs or not all(all(pair) for pair in self.pairs):
            raise InvalidRequest("A text is empty.", param="text_1")

    @property
    def operation(self) -> Operation:
        """Score."""
        return "score"

    def cost(self) -> float:
        """Estimate the tokens of all pairs."""
        return sum(_tokens(first) + _tokens(second) for first, second in self.pairs)

    def content(self) -> Any:
        """Return the pairs."""
        return [list(pair) for pair in self.pairs]


AnyRequest = (
    GenerateRequest | EmbedRequest | RerankRequest | ScoreRequest | CountRequest | DetokenizeRequest
)
"""Every kind, for the messages between processes."""


def _tokens(text: str | Sequence[int]) -> float:
    return len(text) / _CHARACTERS_PER_TOKEN if isinstance(text, str) else len(text)


def _check_continued(messages: Sequence[Message] | None) -> None:
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or last.tool_calls:
        reason = "The last message is continued only if it is an assistant's, without tool calls."
        raise InvalidRequest(reason, param="continue_final")


def _message_tokens(message: Message) -> float:
    called = sum(_tokens(call.name) + _tokens(call.arguments) for call in message.tool_calls)
    seen = sum(part.tokens for part in media_of(message.content))
    return _tokens(text_of(message.content)) + seen + _tokens(message.reasoning) + called


def _tool_tokens(tool: Tool) -> float:
    return _tokens(tool.name) + _tokens(tool.description or "") + _tokens(repr(tool.parameters))


def _readable(text: Text | None) -> str | None:
    return text if isinstance(text, str) else None
