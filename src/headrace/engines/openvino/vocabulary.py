"""A model's vocabulary, through the tokenizer that the library runs for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InvalidRequest
from headrace.engines.tokenizer import SPACE, sentencepiece

if TYPE_CHECKING:
    from openvino_genai import Tokenizer


def without_telemetry() -> None:
    """Keep OpenVINO's tools from reporting their use, by hiding the module that does it.

    Call it before the library is imported.
    """
    modules: dict[str, Any] = sys.modules
    modules["openvino_telemetry"] = None


class Vocabulary:
    """Text to token ids and back. `words` are the bytes of each token.

    `control` are the tokens that a stream leaves out. `eos` and `bos` are -1 where the model has
    none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos = tokenizer.get_eos_token_id()
        self.bos = tokenizer.get_bos_token_id()
        self.pad = max(0, tokenizer.get_pad_token_id())
        self.special_tokens = _special_tokens(tokenizer)
        self.words = _words(tokenizer.get_vocab())
        each = [[token] for token in range(len(self.words))]
        bare = tokenizer.decode(each, skip_special_tokens=True)
        full = tokenizer.decode(each, skip_special_tokens=False)
        pairs = enumerate(zip(bare, full, strict=True))
        self.control = frozenset(token for token, pair in pairs if _is_control(*pair))
        self.control_texts = tuple(full[at] for at in sorted(self.control))
        # The library sets up its table of array types at the first read of a tensor. Two threads
        # that do this at once wait for each other without end: one has the GIL, the other the
        # table's lock.
        self.tokenize("a", add_special=True)

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """Return token ids, markers included."""
        if not text and not add_special:
            return []
        ids = self._tokenizer.encode(text, add_special_tokens=add_special).input_ids.data
        return [int(token) for token in ids.reshape(-1)]

    def data(self, token_ids: Sequence[int], hidden: frozenset[int] = frozenset()) -> bytes:
        """Return the bytes of token ids, without those that are hidden."""
        return b"".join([self.words[token] for token in token_ids if token not in hidden])

    def text(self, token_ids: Sequence[int], hidden: frozenset[int] = frozenset()) -> str:
        """Return the text of token ids; what is no whole character is U+FFFD.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self.check(token_ids)
        return self.data(token_ids, hidden).decode(errors="replace")

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Return the text as the tokenizer joins it, for tokens that are words and not bytes.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        self.check(token_ids)
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def check(self, token_ids: Sequence[int]) -> None:
        """Check ids, as the library takes invalid ones for other tokens.

        Raises:
            InvalidRequest: an id is outside of the vocabulary.
        """
        if not all(0 <= token < len(self.words) for token in token_ids):
            raise InvalidRequest("A token id is outside of the vocabulary.")


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the special tokens that the model has, by their names in templates."""
    ids = {
        "bos_token": (tokenizer.get_bos_token_id(), tokenizer.get_bos_token()),
        "eos_token": (tokenizer.get_eos_token_id(), tokenizer.get_eos_token()),
        "pad_token": (tokenizer.get_pad_token_id(), tokenizer.get_pad_token()),
    }
    return {name: text for name, (token, text) in ids.items() if token >= 0 and text}


def _is_control(bare: str, full: str) -> bool:
    # An incomplete character is empty in both.
    return not bare and bool(full)


def _words(vocabulary: dict[bytes, int]) -> list[bytes]:
    words = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for word, token in vocabulary.items():
        words[token] = word
    if not any(word.startswith(SPACE) for word in words):
        return words
    return [sentencepiece(word) for word in words]
