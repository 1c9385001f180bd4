"""Turns requests into engine requests: template, tokens, context length, stops. Blocking."""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

import msgspec

from headrace.core.constraint import FORMS, Constraint
from headrace.core.errors import ConfigError, ContextOverflow, InvalidRequest, Unsupported
from headrace.core.model import Capabilities, ModelSpec
from headrace.core.request import CountRequest, GenerateRequest
from headrace.core.sampling import Sampling
from headrace.engines.base import Engine, EngineFacts, EngineRequest, Generator
from headrace.text.grammar import after, grammar
from headrace.text.template import ChatTemplate
from headrace.worker.chat import Before, Budget, Chat, NewSplitter, Parsing
from headrace.worker.gaps import gap_ids
from headrace.worker.images import check_markers, check_media
from headrace.worker.infill import Infill, infill_of
from headrace.worker.parts import thought_tokens
from headrace.worker.scored import check_scored, check_size
from headrace.worker.tokens import Gone, Limit, tokenized

# Implemented by the worker for all engines.
_BY_WORKER = {"stop"}
# Bytes of a UTF-8 character that can be missing at the end of a text.
_MAX_MISSING_BYTES = 3


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The engine requests of a request, one for each choice, and its stop strings.

    `answered_text` is the text of the tokens of an answer that is continued. `over` is the finish
    reason if that answer was complete. `splitter` makes the parser of an answer that may have
    thinking or calls. `constraint` is what the content has to be, or the whole text with its calls.
    `before` is what the grammar of the content allows before it: thinking. `budget` is that of the
    thinking; `answered_thought` counts its tokens in `answered`. `compiled` is the constraint of
    the content without thinking, as the engine has it.
    `context_length` bounds the prompt with its media, whose tokens the engine counts.
    """

    choices: tuple[EngineRequest, ...]
    stops: tuple[str, ...]
    echo: str = ""
    answered_text: str = ""
    constraint: Constraint | None = None
    splitter: NewSplitter | None = None
    before: Before = ("", "")
    budget: Budget | None = None
    answered_thought: int = 0
    compiled: Constraint | None = None
    over: Literal["stop", "length"] | None = None
    context_length: int = 0

    def enforcing(self, constraint: Constraint) -> Job:
        """Return the job with what the engine enforces: this constraint, after the thinking."""
        compiled = constraint
        if self.before[0]:
            constraint = Constraint(lark=after(*self.before, grammar(constraint)))
        if constraint is self.constraint:
            return msgspec.structs.replace(self, compiled=compiled)
        choices = [
            msgspec.structs.replace(choice, constraint=constraint) for choice in self.choices
        ]
        return msgspec.structs.replace(self, choices=tuple(choices), compiled=compiled)


class Prompter:
    """Turns requests into token ids for one loaded engine."""

    def __init__(self, spec: ModelSpec, engine: Engine) -> None:
        self._engine = engine
        self._name = spec.name
        self._facts = facts = engine.facts
        self._stops = spec.stop
        self.template, self.note = _template(spec, facts)
        self.chat = Chat(self.template, engine, spec.tool_format) if self.template else None
        generates = "generate" in facts.capabilities.tasks
        self.infill = infill_of(engine, facts.infill_ids) if generates else None
        self.enforces_grammars = "grammar" in facts.capabilities.forms

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the template knows; none without a template."""
        return self.template.roles if self.template else ()

    def job(self, request: GenerateRequest, gone: Gone | None = None) -> Job:
        """Return the job of a request; `gone` is set when nothing waits for it any more.

        Raises:
            Unsupported: the engine cannot honour a field.
            InvalidRequest, ContextOverflow: the request is wrong.
        """
        able = self._facts.capabilities
        sampling = request.sampling.without_neutral(able.sampling)
        request = msgspec.structs.replace(request, sampling=sampling)
        check_supported(request, able, self._name)
        context_length = self._context_length(request)
        text = None if request.messages is None else self._chat_text(request)
        token_ids = self._token_ids(request, text, context_length, gone)
        parsing = self._parsing(request, text)
        media = tuple(request.media[part.digest] for part in request.media_parts)
        known = len(self._without_images(text, token_ids) if media and text else token_ids)
        check_size(request, known)
        max_tokens = max_new_tokens(request, known, context_length)
        answered, answered_text, ended = self._answered(request, parsing.visible)
        left = max(0, max_tokens - len(answered))
        shared = EngineRequest(
            token_ids=token_ids,
            max_tokens=left,
            answered=answered,
            sampling=self._sampling(request, max_tokens, len(answered)),
            constraint=self._enforced(parsing.enforced),
            visible=parsing.visible,
            text=text if media and text else "",
            media=media,
            adapter=request.adapter,
        )
        return Job(
            choices=tuple(_seeded(shared, index) for index in range(request.n)),
            constraint=parsing.constraint,
            splitter=parsing.splitter,
            budget=parsing.budget,
            answered_thought=self._thought(parsing, answered),
            before=self._before(request, text),
            stops=(*request.sampling.stop, *self._stops),
            echo=self._echo(request),
            answered_text=answered_text,
            over="stop" if ended else None if left else "length",
            context_length=context_length,
        )

    def _before(self, request: GenerateRequest, text: str | None) -> Before:
        return self.chat.thinking(request, text) if self.chat and text is not None else ("", "")

    def count(self, request: CountRequest, gone: Gone | None = None) -> tuple[int, ...]:
        """Return the token ids of a text, or of messages as the template puts them."""
        if request.messages is not None:
            text = self.rendered(request)
            return self._without_images(text, self._chat_ids(text, Limit(gone, param="messages")))
        add_special = request.add_special
        return tokenized(self._engine, request.text or "", Limit(gone), add_special=add_special)

    def rendered(self, request: CountRequest) -> str:
        """Return messages as the template puts them."""
        check_media(request, self._facts.capabilities, self._name)
        return self._chat_text(request)

    def _token_ids(
        self, request: GenerateRequest, text: str | None, context_length: int, gone: Gone | None
    ) -> tuple[int, ...]:
        if text is not None:
            return self._chat_ids(text, Limit(gone, context_length, "messages"))
        if request.suffix is not None:
            return gap_ids(self._require_infill(), request, Limit(gone, context_length, "prompt"))
        if isinstance(request.prompt, tuple):
            return request.prompt
        limit = Limit(gone, context_length, "prompt")
        token_ids = tokenized(self._engine, request.prompt or "", limit)
        if not token_ids:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        return token_ids

    def _without_images(self, text: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens of a prompt without those of the markers of images and sounds."""
        marker = self._facts.image_marker
        if not marker or marker not in text:
            return token_ids
        plain = text.replace(marker, "")
        return self._chat_ids(plain, Limit()) if plain else ()

    def _sampling(self, request: GenerateRequest, max_tokens: int, answered: int) -> Sampling:
        """Return the sampling of what follows the tokens that were answered."""
        least = request.sampling.min_tokens or 0
        if least > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {least}, and there is room for {max_tokens}.", param="min_tokens"
            )
        return msgspec.structs.replace(
            request.sampling,
            min_tokens=max(0, least - answered) or None,
            stop_token_ids=self._stop_token_ids(request),
        )

    def _require_infill(self) -> Infill:
        if self.infill is None:
            raise Unsupported(
                "This model cannot fill in the middle: it has no tokens for that.", param="suffix"
            )
        return self.infill

    def _stop_token_ids(self, request: GenerateRequest) -> tuple[int, ...]:
        """Return the tokens that end the answer: also those that end a gap."""
        given = request.sampling.stop_token_ids
        supported = "stop_token_ids" in self._facts.capabilities.sampling
        if request.suffix is None or request.sampling.ignore_eos or not supported:
            return given
        ends = self._require_infill().ends
        return (*given, *(token for token in ends if token not in given))

    def _chat_text(self, request: GenerateRequest | CountRequest) -> str:
        if self.chat is None:
            raise Unsupported(
                "This model has no chat template; send a prompt, or configure chat_template.",
                param="messages",
            )
        text = self.chat.render(request)
        check_markers(text, request, self._facts.image_marker)
        return text

    def _parsing(self, request: GenerateRequest, text: str | None) -> Parsing:
        if text is None or self.chat is None:
            return Parsing(constraint=request.constraint, enforced=request.constraint)
        parsing, choice = self.chat.parsing(request, text), request.tool_choice
        enforces = self.enforces_grammars
        # The arguments of strict tools are checked at the end: a wrong call is an error then.
        if choice.mode == "required" and parsing.constraint is not None and not enforces:
            raise Unsupported(
                "This engine does not enforce calls of tools; use auto.", param="tool_choice"
            )
        if (form := request.constraint) and request.enforces_calls and not enforces:
            raise Unsupported("This engine does not enforce a form beside tools.", param=form.param)
        return parsing

    def _enforced(self, constraint: Constraint | None) -> Constraint | None:
        """Return the constraint for the engine; of calls it may only be checked at the end."""
        is_lark = constraint is not None and constraint.form == "lark"
        return None if is_lark and not self.enforces_grammars else constraint

    def _chat_ids(self, text: str, limit: Limit) -> tuple[int, ...]:
        # Most templates write the BOS token themselves: it must not be added twice.
        bos = self._facts.bos_token
        written = bool(bos) and text.startswith(bos)
        token_ids = tokenized(self._engine, text, limit, add_special=not written)
        if not token_ids:
            raise InvalidRequest("The messages are empty.", param="messages")
        return token_ids

    def _thought(self, parsing: Parsing, answered: tuple[int, ...]) -> int:
        if parsing.splitter is None or not answered:
            return 0
        shown = cast("Generator", self._engine).shown
        tokens = thought_tokens(
            parsing.splitter, len(answered), lambda n: shown(answered[:n], parsing.visible)
        )
        # Those that have closed it at its budget are not counted.
        return tokens if parsing.budget is None else min(tokens, parsing.budget.tokens)

    def _answered(
        self, request: GenerateRequest, visible: frozenset[int]
    ) -> tuple[tuple[int, ...], str, bool]:
        """Return the tokens to continue after, their text, and whether they end the answer.

        If an answer was cut within a character, the tokens of that character are dropped: they
        are generated again.
        """
        given = request.answered
        if not given:
            return (), "", False
        ends = self._ends(request.sampling)
        end = next((place for place, token in enumerate(given) if token in ends), None)
        given = given if end is None else given[: end + 1]
        shown = partial(cast("Generator", self._engine).shown, visible=visible)
        text = shown(given)
        for missing in range(_MAX_MISSING_BYTES + 1):
            kept = given[: len(given) - missing]
            whole = shown(kept) if missing else text
            if not whole.endswith("\ufffd"):
                return kept, whole, end is not None
        # U+FFFD itself, or bytes that are not UTF-8: it was sent like this.
        return given, text, end is not None

    def _ends(self, sampling: Sampling) -> frozenset[int]:
        eos = self._facts.eos_token
        if sampling.ignore_eos or not eos:
            return frozenset(sampling.stop_token_ids)
        token_ids = self._engine.tokenize(eos, add_special=False)
        return frozenset((*sampling.stop_token_ids, *(token_ids if len(token_ids) == 1 else ())))

    def _context_length(self, request: GenerateRequest) -> int:
        most, wanted = self._facts.context_length, request.context_length
        if wanted is not None and not 1 <= wanted <= most:
            raise InvalidRequest(
                f"context_length goes from 1 to {most} for this model.", param="context_length"
            )
        return wanted or most

    def _echo(self, request: GenerateRequest) -> str:
        if not request.echo:
            return ""
        if request.prompt is None:
            raise InvalidRequest("echo goes with a prompt, not with messages.", param="echo")
        if request.sampling.logprobs is not None:
            # It comes with its tokens.
            return ""
        if isinstance(request.prompt, str):
            return request.prompt
        return self._engine.detokenize(request.prompt)


def _template(spec: ModelSpec, facts: EngineFacts) -> tuple[ChatTemplate | None, str | None]:
    source = spec.chat_template or facts.chat_template
    if not source:
        return None, None
    try:
        return ChatTemplate(source, facts.special_tokens), None
    except ConfigError as error:
        # A model with an invalid template can still complete prompts.
        if spec.chat_template:
            raise
        return None, f"no chat: {error.message}"


def max_new_tokens(request: GenerateRequest, prompt_tokens: int, context_length: int) -> int:
    """Return the maximum number of tokens to generate.

    Raises:
        ContextOverflow: the prompt, or prompt and `max_tokens`, are too long.
    """
    max_tokens, left = request.sampling.max_tokens, context_length - prompt_tokens
    if max_tokens == left == 0:
        return 0
    if left < 1:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens and the context length is {context_length}; "
            "at least one must be left for the answer.",
            param="prompt" if request.messages is None else "messages",
        )
    if max_tokens is None:
        return left
    if max_tokens > left and request.fit_max_tokens:
        return left
    if max_tokens > left:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_tokens + max_tokens}; the context length is {context_length}.",
            param="max_tokens",
        )
    return max_tokens


def check_supported(request: GenerateRequest, capabilities: Capabilities, name: str = "") -> None:
    """Check that the engine supports the request; `name` is that of the model.

    Raises:
        Unsupported: names a field that it does not support.
    """
    given = msgspec.to_builtins(request.sampling)
    for name in given.keys() - _BY_WORKER - capabilities.sampling:
        raise Unsupported(f"This engine does not support {name}.", param=name)
    if request.constraint is not None:
        _check_constrained(request.constraint, request.sampling, capabilities)
    check_media(request, capabilities, name)
    if isinstance(request.prompt, tuple) and not capabilities.token_prompts:
        raise Unsupported("This engine does not accept token ids.", param="prompt")
    check_scored(request, capabilities)
    if request.answered:
        _check_resumable(request, capabilities)


def _check_constrained(
    constraint: Constraint, sampling: Sampling, capabilities: Capabilities
) -> None:
    form = constraint.form
    if form == "json_schema" and not capabilities.json_schema:
        raise Unsupported("This engine does not support JSON schemas.", param=constraint.param)
    if form in FORMS and form not in capabilities.forms:
        raise Unsupported(f"This engine does not support {form}.", param=form)
    # Where a constraint allows nothing but the end, there would be no token left.
    label = "JSON schema" if form == "json_schema" else form
    for name in ("ignore_eos", "min_tokens"):
        if getattr(sampling, name):
            raise InvalidRequest(
                f"{name} cannot be combined with a {label}, which says where the answer ends.",
                param=name,
            )


def _check_resumable(request: GenerateRequest, capabilities: Capabilities) -> None:
    if not capabilities.resume:
        raise Unsupported("This engine cannot continue an answer.", param="answered")
    constrained = request.constraint is not None or request.enforces_calls
    if request.n > 1 or request.echo or constrained or request.media:
        raise Unsupported(
            "An answer with several choices, an echo, media or a JSON schema cannot be continued.",
            param="answered",
        )


def _seeded(request: EngineRequest, index: int) -> EngineRequest:
    # Each choice of a seeded request has its own seed, the same for every such request.
    sampling = request.sampling
    if sampling.seed is None or index == 0:
        return request
    seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + index) % (1 << 64))
    return msgspec.structs.replace(request, sampling=seeded)
