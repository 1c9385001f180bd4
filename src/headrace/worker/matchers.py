"""llguidance's matchers: of the package, or of the library inside an engine, by its C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import llguidance

END = 256
"""The token after those of the bytes."""

_BYTES = (1 << END) - 1


class Matcher(Protocol):
    """What a compiler makes of a grammar, over the 256 bytes as tokens."""

    @property
    def error(self) -> str:
        """Why it cannot be used; empty if it can."""
        ...

    def prefix(self, data: bytes) -> int:
        """Return how many bytes from the first one a text of the grammar can begin with."""
        ...

    def accepts(self, data: bytes) -> bool:
        """Return whether they are a whole text of the grammar."""
        ...

    def following(self) -> int:
        """Return which bytes may be the next, as bits."""
        ...

    def take(self, byte: int) -> None:
        """Go on after a byte."""
        ...


def from_package(grammar: str) -> Matcher:
    """Compile a grammar with the package llguidance."""
    return _Package(grammar)


class _Package:
    """A matcher of the package llguidance."""

    _TOKENIZER = llguidance.LLTokenizer("byte")

    def __init__(self, grammar: str) -> None:
        self._matcher = llguidance.LLMatcher(self._TOKENIZER, grammar, log_level=0)
        if not self._matcher.is_error():
            self._matcher.compute_bitmask()

    @property
    def error(self) -> str:
        return self._matcher.get_error()

    def prefix(self, data: bytes) -> int:
        return self._matcher.try_consume_tokens(list(data))

    def accepts(self, data: bytes) -> bool:
        tokens = [*data, self._TOKENIZER.eos_token]
        return self._matcher.validate_tokens(tokens) == len(tokens)

    def following(self) -> int:
        return int.from_bytes(self._matcher.compute_bitmask(), "little") & _BYTES

    def take(self, byte: int) -> None:
        self._matcher.consume_token(byte)


class _TokenizerInit(ctypes.Structure):
    """llguidance's LlgTokenizerInit, with room for the fields of later releases."""

    _fields_ = (
        ("vocab_size", ctypes.c_uint32),
        ("tok_eos", ctypes.c_uint32),
        ("token_lens", ctypes.POINTER(ctypes.c_uint32)),
        ("token_bytes", ctypes.c_char_p),
        ("tokenizer_json", ctypes.c_char_p),
        ("tokenize_assumes_string", ctypes.c_bool),
        ("tokenize_fn", ctypes.c_void_p),
        ("use_approximate_greedy_tokenize_fn", ctypes.c_bool),
        ("tokenize_user_data", ctypes.c_void_p),
        ("slices", ctypes.c_void_p),
        ("later", ctypes.c_char * 256),
    )


class Library:
    """The llguidance that is linked into a library of an engine, by its C interface.

    Raises:
        OSError, AttributeError: the library cannot be loaded, or has no such interface.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        self._functions = functions = {
            name: getattr(library, f"llg_{name}")
            for name in (
                *("constraint_init_set_defaults", "new_tokenizer", "new_matcher"),
                "free_matcher",
            )
        }
        for name in ("get_error", "compute_mask", "validate_tokens", "consume_token", "get_mask"):
            functions[name] = getattr(library, f"llg_matcher_{name}")
        for name in ("new_tokenizer", "new_matcher"):
            functions[name].restype = ctypes.c_void_p
        functions["get_error"].restype = ctypes.c_char_p
        functions["get_mask"].restype = ctypes.c_void_p
        self._lengths = (ctypes.c_uint32 * (END + 1))(*[1] * END, 4)
        self._init = ctypes.create_string_buffer(1024)
        functions["constraint_init_set_defaults"](self._init, ctypes.c_void_p(self._tokenizer()))

    def __call__(self, grammar: str) -> Matcher:
        """Compile a grammar, as llama.cpp does."""
        new = self._functions["new_matcher"]
        return _Linked(self._functions, new(self._init, b"lark", grammar.encode()))

    def _tokenizer(self) -> int:
        # The bytes, and the end: tokens that begin with 0xFF are no text.
        init = _TokenizerInit(END + 1, END, self._lengths, bytes(range(256)) + b"\xffEOS")
        init.use_approximate_greedy_tokenize_fn = True
        error = ctypes.create_string_buffer(256)
        tokenizer = self._functions["new_tokenizer"](
            ctypes.byref(init), error, ctypes.c_size_t(len(error))
        )
        if not tokenizer:
            raise OSError(error.value.decode(errors="replace"))
        return tokenizer


class _Linked:
    """A matcher of a linked llguidance."""

    def __init__(self, functions: Mapping[str, Any], address: int) -> None:
        self._functions = functions
        self._address = ctypes.c_void_p(address)
        if not self.error:
            functions["compute_mask"](self._address)

    def __del__(self) -> None:
        self._functions["free_matcher"](self._address)

    @property
    def error(self) -> str:
        error: bytes | None = self._functions["get_error"](self._address)
        return (error or b"").decode(errors="replace")

    def prefix(self, data: bytes) -> int:
        return self._valid(tuple(data))

    def accepts(self, data: bytes) -> bool:
        return self._valid((*data, END)) == len(data) + 1

    def following(self) -> int:
        self._functions["compute_mask"](self._address)
        mask: int | None = self._functions["get_mask"](self._address)
        return int.from_bytes(ctypes.string_at(mask, END // 8), "little") if mask else 0

    def take(self, byte: int) -> None:
        self._functions["consume_token"](self._address, ctypes.c_uint32(byte))

    def _valid(self, tokens: tuple[int, ...]) -> int:
        given = (ctypes.c_uint32 * len(tokens))(*tokens)
        validate = self._functions["validate_tokens"]
        return validate(self._address, given, ctypes.c_size_t(len(tokens)))


Compile = Callable[[str], Matcher]
