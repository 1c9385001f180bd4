"""Tokenizers of model folders: text, ids and the bytes of each id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from headrace.core.errors import InvalidRequest

_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581".encode()
"""SentencePiece writes a space as this character, and a byte as `<0xNN>`."""

_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# How many bytes of a text can become one after a tokenizer's normalisation; no others are known.
_SHRINKS = {"Prepend": 1, "Replace": 1, "NFC": 4, "Sequence": 1}

Decode = Callable[[str], bytes]


class Vocabulary:
    """A tokenizer for use by many threads; `size` may be larger than the tokenizer's own."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.size = size
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = None if self._backend is None else _decoder(self._backend)
        self.control_texts = tuple(
            added.content for added in tokenizer.added_tokens_decoder.values() if added.special
        )
        self._bytes_of: dict[int, bytes] = dict.fromkeys(tokenizer.all_special_ids, b"")
        self._readers: dict[frozenset[int], Callable[[int], bytes]] = {frozenset(): self.data}
        for token, added in tokenizer.added_tokens_decoder.items():
            self._bytes_of[token] = b"" if added.special else added.content.encode()
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        if self._backend is None:
            return self._tokenizer.encode(text, add_special_tokens=add_special)
        # The wrapper of transformers is not thread-safe: each call changes its state.
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text, markers included.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self.check(token_ids, param="tokens")
        if self._backend is None:
            return self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def data(self, token: int) -> bytes:
        """Return the bytes that a token adds to an answer; none for a control token."""
        known = self._bytes_of.get(token)
        if known is None:
            known = self._bytes_of[token] = self._look_up(token)
        return known

    def reader(self, visible: frozenset[int]) -> Callable[[int], bytes]:
        """Return a function like `data` that gives the text of `visible` control tokens too."""
        if visible not in self._readers:
            texts = {token: self.detokenize((token,)).encode() for token in visible}
            self._readers[visible] = lambda token: texts.get(token) or self.data(token)
        return self._readers[visible]

    def full_data(self, token: int) -> bytes:
        """Return the bytes of a token's text, also for a control token."""
        return self.data(token) or self.detokenize((token,)).encode()

    def check(self, token_ids: Iterable[int], *, param: str | None = None) -> None:
        """Refuse ids that the model does not have.

        Raises:
            InvalidRequest: naming `param`.
        """
        if not all(0 <= token < self.size for token in token_ids):
            raise InvalidRequest("A token id is outside of the vocabulary.", param=param)

    def max_token_bytes(self) -> int | None:
        """Return how many bytes of text one token can stand for; None if that has no limit."""
        if self._backend is None:
            return None
        state = json.loads(self._backend.to_str())
        model, normalizer = state["model"], state.get("normalizer")
        kinds = set(_kinds(normalizer, "normalizers")) if normalizer else set[str]()
        lossless = isinstance(self._decode, _ByteLevel) or model.get("byte_fallback")
        if model["type"] != "BPE" or not lossless or kinds - _SHRINKS.keys():
            return None
        longest = max(len(token.encode()) for token in self._backend.get_vocab())
        return longest * max((_SHRINKS[kind] for kind in kinds), default=1)

    def _look_up(self, token: int) -> bytes:
        if self._decode is None:
            return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()
        piece = self._backend.id_to_token(token) if self._backend is not None else None
        return b"" if piece is None else self._decode(piece)


def without_markers(text: str, markers: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text, cut within each marker, so that none is whole in a piece."""
    cuts: set[int] = set()
    for marker in markers:
        place = text.find(marker) if len(marker) > 1 else -1
        while place >= 0:
            cuts.add(place + 1)
            place = text.find(marker, place + 1)
    begin = 0
    for place in sorted(cuts):
        yield text[begin:place]
        begin = place
    yield text[begin:]


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Return the texts of the special tokens that a model has, by their names in templates."""
    texts = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    return {name: str(text) for name, text in texts.items() if text}


class TokenizerMixin:
    """The tokenization methods of an engine with a Vocabulary."""

    _vocabulary: Vocabulary

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return token ids, markers included."""
        return self._vocabulary.tokenize(text, add_special=add_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return text.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        return self._vocabulary.detokenize(token_ids)

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[Sequence[int]]:
        """Yield the token ids of a text in which markers are text, piece after piece."""
        for piece in without_markers(text, (*self._vocabulary.control_texts, *markers)):
            yield self._vocabulary.tokenize(piece, add_special=False)

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        self._vocabulary.check(token_ids, param="answered")
        data = map(self._vocabulary.reader(visible), token_ids)
        return b"".join(data).decode(errors="replace")


def _decoder(backend: Any) -> Decode | None:
    """Return a decoder of the tokenizer's pieces; None if only the tokenizer can decode them."""
    if backend.decoder is None:
        return None
    kinds = set(_kinds(json.loads(backend.decoder.__getstate__())))
    if "ByteLevel" in kinds:
        return _ByteLevel()
    return _sentencepiece if kinds & {"ByteFallback", "Metaspace"} else None


def _kinds(part: dict[str, Any], inner: str = "decoders") -> Iterable[str]:
    """Yield the type of a part of a tokenizer, and of all parts inside of it."""
    yield part["type"]
    for each in part.get(inner, ()):
        yield from _kinds(each, inner)


class _ByteLevel:
    """Decodes pieces in which each character is a byte: itself where it is printable."""

    def __init__(self) -> None:
        printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = (byte for byte in range(256) if byte not in printed)
        self._bytes = {chr(byte): byte for byte in printed}
        self._bytes |= {chr(256 + number): byte for number, byte in enumerate(others)}

    def __call__(self, piece: str) -> bytes:
        return bytes(self._bytes[character] for character in piece)


def sentencepiece(piece: bytes) -> bytes:
    """Return the bytes of a piece of SentencePiece."""
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1].decode()) if byte else piece.replace(SPACE, b" ")


def _sentencepiece(piece: str) -> bytes:
    return sentencepiece(piece.encode())
