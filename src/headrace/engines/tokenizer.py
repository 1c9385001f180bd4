"""Tokenizers of model folders: text, ids and the bytes of each id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from headrace.core.errors import InvalidRequest

_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581".encode()
"""SentencePiece writes a space as this character, and a byte as `<0xNN>`."""

Decode = Callable[[str], bytes]


class Vocabulary:
    """A tokenizer for use by many threads; `size` may be larger than the tokenizer's own."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.size = size
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode = None if self._backend is None else _decoder(self._backend)
        self._bytes_of: dict[int, bytes] = dict.fromkeys(tokenizer.all_special_ids, b"")
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

    def check(self, token_ids: Iterable[int], *, param: str | None = None) -> None:
        """Refuse ids that the model does not have.

        Raises:
            InvalidRequest: naming `param`.
        """
        if not all(0 <= token < self.size for token in token_ids):
            raise InvalidRequest("A token id is outside of the vocabulary.", param=param)

    def _look_up(self, token: int) -> bytes:
        if self._decode is None:
            return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()
        piece = self._backend.id_to_token(token) if self._backend is not None else None
        return b"" if piece is None else self._decode(piece)


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

    def shown(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids without control tokens, which a stream leaves out."""
        self._vocabulary.check(token_ids, param="answered")
        return b"".join(map(self._vocabulary.data, token_ids)).decode(errors="replace")


def _decoder(backend: Any) -> Decode | None:
    """Return a decoder of the tokenizer's pieces; None if only the tokenizer can decode them."""
    if backend.decoder is None:
        return None
    kinds = set(_kinds(json.loads(backend.decoder.__getstate__())))
    if "ByteLevel" in kinds:
        return _ByteLevel()
    return _sentencepiece if kinds & {"ByteFallback", "Metaspace"} else None


def _kinds(decoder: dict[str, Any]) -> Iterable[str]:
    yield decoder["type"]
    for inner in decoder.get("decoders", ()):
        yield from _kinds(inner)


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
