"""A GGUF that a server of llama.cpp runs, in this process or in one of its own."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.constraint import Constraint, TextForm
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed, Unsupported
from headrace.core.model import Capabilities, Task
from headrace.engines import base, plan, threaded
from headrace.engines.abilities import longest_text
from headrace.engines.base import EngineFacts, EngineRequest, OpenRequest, Pair, RawEvent
from headrace.engines.llamacpp import Options, settled
from headrace.engines.llamacpp.call import HONOURED, in_lark
from headrace.engines.llamacpp.groups import Groups, in_turns
from headrace.engines.llamacpp.link import Link
from headrace.engines.llamacpp.native import NativeCall
from headrace.engines.llamacpp.pieces import SENTINEL, SIZE, Pieces
from headrace.engines.plan import CachePlan
from headrace.engines.tokenizer import without_markers

_NO_DRAFTS = "speculation is off, as the model takes images or audio"


class Served(base.Embedder):
    """What is the same wherever the server runs: token ids, requests, facts.

    A class that derives from it has `_load`, which sets `_link`, and calls `_settle` in it.
    """

    def __init__(self, request: OpenRequest) -> None:
        self._options = self._settled(request)
        self._model = request.model
        self._adapters = request.adapters
        self._groups = Groups()
        self._task: Task = request.task
        if self._task == "rerank" and request.model.task != "rerank":
            raise LoadFailed("This model ranks nothing: its file has no head that does.")
        self._drafts = self._options.drafts and self._task == "generate"
        self._inbox: threaded.Inbox | None = None
        self._link: Link | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._vocabulary = 0
        self._texts: dict[int, str] = {}
        try:
            self._load(request)
        except BaseException:
            self.close()
            raise

    def _settled(self, request: OpenRequest) -> Options:
        return settled(request)

    def _load(self, request: OpenRequest) -> None:
        raise NotImplementedError

    def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Return the events of a request."""
        if self._inbox is None:
            self._inbox = threaded.Inbox(asyncio.get_running_loop())
        if self._threads is None or self._link is None:
            raise GenerationFailed("The engine is closed.")
        self._check((*request.token_ids, *request.answered))
        self._check(request.sampling.logit_bias, param="logit_bias")
        visible = [self._text(token) for token in request.visible]
        if request.media:
            request = self._with_text(request)
        start = partial(self._events, visible=visible, inbox=self._inbox, threads=self._threads)
        return in_turns(self._groups, request, start) if self._adapters else start(request)

    def _events(
        self,
        request: EngineRequest,
        visible: Sequence[str],
        inbox: threaded.Inbox,
        threads: ThreadPoolExecutor,
    ) -> AsyncGenerator[RawEvent, None]:
        """Return the events of a request over the socket."""
        call = NativeCall(request, self._split, visible, drafts=self._drafts)
        call.constrained = self._constrained
        call.lora = self._lora(request)
        return call.events(self._opened(), inbox, threads)

    def _lora(self, request: EngineRequest) -> Sequence[dict[str, float]]:
        """Return the scale of each adapter of the server in a request."""
        return [
            {"id": number, "scale": file.scale if file.name == request.adapter else 0.0}
            for number, file in enumerate(self._adapters)
        ]

    def _constrained(self, constraint: Constraint) -> dict[str, Any]:
        return in_lark(constraint)

    def _with_text(self, request: EngineRequest) -> EngineRequest:
        if request.sampling.logprobs is not None:
            raise Unsupported(
                "Log-probabilities do not go with images or audio here.", param="logprobs"
            )
        # The library puts it before each text.
        bos = self.facts.bos_token
        return msgspec.structs.replace(request, text=request.text.removeprefix(bos))

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return the pooled vectors, not normalised."""
        for token_ids in batch:
            self._check(token_ids, param="input")
        body = {"input": [list(token_ids) for token_ids in batch], "encoding_format": "base64"}
        rows = sorted(self._vectors(body)["data"], key=lambda row: row["index"])
        return [base64.b64decode(row["embedding"]) for row in rows]

    def _vectors(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._opened().ask("/v1/embeddings", body, timeout_s=None)

    def pair(self, query: str, document: str) -> Pair:
        """Return both texts, with as many token ids as the server makes: markers are text to it."""
        before, after = self._around
        texts = (query, document)
        ids = [chain.from_iterable(self._cut(text, markers=False)) for text in texts]
        first = (*before, *ids[0], *self._between)
        return Pair((*first, *ids[1], *after), len(first), texts)

    def score(self, batch: Sequence[Pair]) -> Sequence[float]:
        """Return the scores that the server reports: what the model's head gives."""
        places: dict[str, list[int]] = {}
        for place, pair in enumerate(batch):
            places.setdefault(_texts(pair)[0], []).append(place)
        scores = [0.0] * len(batch)
        for query, mine in places.items():
            body = {"query": query, "documents": [_texts(batch[place])[1] for place in mine]}
            for row in self._ranking(body)["results"]:
                scores[mine[row["index"]]] = float(row["relevance_score"])
        return scores

    def _ranking(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._opened().ask("/v1/rerank", body, timeout_s=None)

    @cached_property
    def _between(self) -> tuple[int, ...]:
        """Stand for the tokens that the server puts between two texts, whatever they are."""
        used = self._ranking({"query": "a", "documents": ["a"]})["usage"]["prompt_tokens"]
        before, after = self._around
        missing = used - 2 * len(self._tokens("a")) - len(before) - len(after)
        return (after or before or (0,))[-1:] * max(0, missing)

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        return [*chain.from_iterable(self.tokenize_pieces(text, add_special=add_special))]

    def tokenize_pieces(self, text: str, *, add_special: bool) -> Iterator[Sequence[int]]:
        """Yield what `tokenize` returns, piece after piece: of long texts it takes long."""
        if len(text) <= SIZE:
            yield self._tokens(text, add_special=add_special)
            return
        before, after = self._around if add_special else ((), ())
        yield before
        yield from self._cut(text)
        yield after

    def _cut(self, text: str, *, markers: bool = True) -> Iterator[Sequence[int]]:
        pieces = (text,) if len(text) <= SIZE else self._pieces.cut(text)
        for number, piece in enumerate(pieces):
            self._check_length(piece)
            ids = self._tokens(piece, markers=markers)
            continues = number and piece.startswith(SENTINEL)
            yield ids[len(self._sentinel) :] if continues else ids

    def _check_length(self, piece: str) -> None:
        most = longest_text(self.facts)
        if len(piece) * 4 > most and len(piece.encode()) > most:
            raise InvalidRequest(
                f"More than {most} bytes of the text have no place where it can be cut into words.",
                param="prompt",
            )

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[Sequence[int]]:
        """Yield the token ids of a text in which markers are text, piece after piece."""
        for part in without_markers(text, markers):
            yield from self._cut(part, markers=False)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self._check(token_ids)
        return self._ask("/detokenize", {"tokens": list(token_ids)})["content"]

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        text = self.detokenize(token_ids)
        # Only the text of a control token has other ids when markers are parsed.
        differing = {*self._split(text, markers=True)}.difference(self._split(text), visible)
        control = set(filter(self._is_control, differing.intersection(token_ids)))
        if not control:
            return text
        return self.detokenize([token for token in token_ids if token not in control])

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.detokenize((token,))
        return self._texts[token]

    def _is_control(self, token: int) -> bool:
        text = self.detokenize((token,))
        return self._split(text, markers=True) == (token,) != self._split(text)

    def _split(self, text: str, *, markers: bool = False) -> tuple[int, ...]:
        return self._tokens(text, markers=markers)

    def _tokens(
        self, text: str, *, add_special: bool = False, markers: bool = True
    ) -> tuple[int, ...]:
        body = {"content": text, "add_special": add_special, "parse_special": markers}
        return tuple(self._ask("/tokenize", body)["tokens"])

    @cached_property
    def _pieces(self) -> Pieces:
        # Read when the first long text comes: it takes a moment.
        longest = longest_text(self.facts)
        return Pieces(Path(self._model.path), self._model.tokenizer or "", longest)

    @cached_property
    def _sentinel(self) -> tuple[int, ...]:
        return self._tokens(SENTINEL)

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that are put before and after a text."""
        plain, full = self._tokens("a"), self._tokens("a", add_special=True)
        size = len(plain)
        at = next(n for n in range(len(full)) if full[n : n + size] == plain)
        return full[:at], full[at + size :]

    def close(self) -> None:
        """Free the model and remove the private directory."""
        link, self._link = self._link, None
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        if link is not None:
            link.close()

    def _settle(self, request: OpenRequest, planned: CachePlan, device: str) -> None:
        """Read the facts from the server, and be ready for requests."""
        self._vocabulary = int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])
        self.facts = self._facts(request, planned, device)
        if self._task != "generate":
            self.facts = self._encoding_facts(request)
        self._threads = ThreadPoolExecutor(planned.slots, "llamacpp")

    def _undrafted(self, planned: CachePlan) -> CachePlan:
        """Draft nothing, as the server drafts none for models with a projector; return the plan."""
        if not self._drafts:
            return planned
        self._drafts = False
        return msgspec.structs.replace(planned, notes=(*planned.notes, _NO_DRAFTS))

    def _facts(self, request: OpenRequest, planned: CachePlan, device: str) -> EngineFacts:
        props = self._ask("/props")
        granted = props["default_generation_settings"]["n_ctx"]
        modalities = props.get("modalities", {})
        sees, hears = (bool(modalities.get(kind)) for kind in ("vision", "audio"))
        plan.granted_context(request, granted)
        return EngineFacts(
            device=device,
            context_length=min(granted, planned.context_length),
            max_running=planned.slots,
            chat_template=self._model.chat_template,
            special_tokens=self._special_tokens(),
            max_token_bytes=self._model.max_token_bytes,
            notes=planned.notes,
            grammar_library=self._grammar_library(),
            image_marker=props.get("media_marker", "") if sees or hears else "",
            infill_ids=tuple(n for n in self._model.infill_ids if n < self._vocabulary),
            capabilities=Capabilities(
                sampling=HONOURED,
                json_schema=self._takes_schemas(),
                forms=self._forms(),
                batch_invariant=device == "cpu" and _is_reproducible(self._options),
                resume=True,
                vision=sees,
                audio=hears,
                speculation=self._options.way if self._drafts else "",
                adapters=True,
            ),
        )

    def _special_tokens(self) -> dict[str, str]:
        # The library's own defaults are other tokens where the file names none.
        ids = self._model.special_ids.items()
        return {name: self.detokenize((n,)) for name, n in ids if n < self._vocabulary}

    def _encoding_facts(self, request: OpenRequest) -> EngineFacts:
        dimensions = len(self.embed([[0]])[0]) // 4 if self._task == "embed" else None
        return msgspec.structs.replace(
            self.facts,
            max_running=plan.encoder_requests(request),
            capabilities=Capabilities(tasks=frozenset({self._task}), dimensions=dimensions),
            chat_template=None,
        )

    def _check(self, token_ids: Iterable[int], *, param: str | None = None) -> None:
        # The library truncates an id to 32 bits before it checks it.
        if not all(0 <= token < self._vocabulary for token in token_ids):
            raise InvalidRequest("A token id is outside of the vocabulary.", param=param)

    def _grammar_library(self) -> str:
        """Return the file with the llguidance that compiles constraints; "" is the package's."""
        return ""

    def _takes_schemas(self) -> bool:
        return True

    def _forms(self) -> frozenset[TextForm]:
        """Return the forms of constraints, beside schemas, that the server can enforce."""
        raise NotImplementedError

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._opened().ask(path, body)

    def _opened(self) -> Link:
        if self._link is None:
            raise GenerationFailed("The engine is closed.")
        return self._link


def _texts(pair: Pair) -> tuple[str, str]:
    if pair.texts is None:
        raise GenerationFailed("llama.cpp ranks texts, not token ids.")
    return pair.texts


def _is_reproducible(options: Options) -> bool:
    # Measured, in 60 of 60 answers: with an f16 cache, rounding in prompts longer than a batch
    # depends on the concurrent requests.
    return options.kv_type in {"bf16", "q8_0"} and options.flash_attention == "on"
