"""The process that compiles schemas and checks answers, which `worker/compiler.py` starts.

What a client's schema makes a compiler do cannot be foreseen, and native code cannot be stopped
from outside. So it runs here first, with limits of memory and time that the kernel keeps. Jobs and
replies are lines of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any, Protocol, cast

import jsonschema_rs
import llguidance

from headrace.core.schema import Path, Schema, children, pointer
from headrace.text.grammar import regex_position, schema_grammar
from headrace.text.lark import Unenforceable, normalised

MEMORY = 192 << 20
"""Bytes that a job may take, beside what the libraries take."""
CPU_S = 2
"""Seconds of a core that a job may take."""
_LOCATING_S = 1.0
_LONGEST = 300
_TOO_MUCH = "takes too much to compile"
_NO_TEXT = "allows no text"
_PR_SET_PDEATHSIG = 1
_END = 256
"""The token after those of the bytes."""
_BYTES = (1 << _END) - 1
_REHEARSED, _REHEARSAL_S = 300, 0.2
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_CARET = re.compile(r"^    ( *)\^", re.MULTILINE)


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
        self._lengths = (ctypes.c_uint32 * (_END + 1))(*[1] * _END, 4)
        self._init = ctypes.create_string_buffer(1024)
        functions["constraint_init_set_defaults"](self._init, ctypes.c_void_p(self._tokenizer()))

    def __call__(self, grammar: str) -> Matcher:
        """Compile a grammar, as llama.cpp does."""
        new = self._functions["new_matcher"]
        return _Linked(self._functions, new(self._init, b"lark", grammar.encode()))

    def _tokenizer(self) -> int:
        # The bytes, and the end: tokens that begin with 0xFF are no text.
        init = _TokenizerInit(_END + 1, _END, self._lengths, bytes(range(256)) + b"\xffEOS")
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
        return self._valid((*data, _END)) == len(data) + 1

    def following(self) -> int:
        self._functions["compute_mask"](self._address)
        mask: int | None = self._functions["get_mask"](self._address)
        return int.from_bytes(ctypes.string_at(mask, _END // 8), "little") if mask else 0

    def take(self, byte: int) -> None:
        self._functions["consume_token"](self._address, ctypes.c_uint32(byte))

    def _valid(self, tokens: tuple[int, ...]) -> int:
        given = (ctypes.c_uint32 * len(tokens))(*tokens)
        validate = self._functions["validate_tokens"]
        return validate(self._address, given, ctypes.c_size_t(len(tokens)))


Compile = Callable[[str], Matcher]


def compiled(schema: Schema, new_matcher: Compile) -> None:
    """Compile a schema.

    Raises:
        Refused: it is no schema, or cannot be enforced.
    """
    _validator(schema)
    if problem := new_matcher(schema_grammar(schema)).error:
        raise Refused(_located(schema, new_matcher), _reason(problem))


def followed(
    grammar: str, text: str, new_matcher: Compile, *, cut: bool = True, regex: str = ""
) -> None:
    """Compile a grammar, and check a text of it; of one that was `cut`, only its beginning.

    `regex` is what the grammar was made of, for errors.

    Raises:
        Refused: it cannot be enforced, or the text is none of its texts.
    """
    matcher, data = new_matcher(grammar), text.encode()
    if problem := matcher.error:
        raise Refused((), _reason_of_grammar(problem, regex))
    kept = not data or matcher.prefix(data) == len(data) if cut else matcher.accepts(data)
    if not kept:
        raise Refused((), "is not followed")


def rehearsed(grammar: str, new_matcher: Compile) -> None:
    """Write a random text of a grammar, in which each byte has to take a short time.

    An ambiguous grammar takes the longer the more there is, and an engine's other requests wait.

    Raises:
        Refused: it takes too much.
    """
    draw = random.Random(0)  # noqa: S311  # the same for each
    matcher, began = new_matcher(grammar), time.process_time()
    for _ in range(_REHEARSED):
        following = matcher.following()
        allowed = [byte for byte in range(_END) if following >> byte & 1]
        if matcher.error or time.process_time() - began > _REHEARSAL_S:
            raise Refused((), _TOO_MUCH)
        if not allowed:
            return
        matcher.take(draw.choice(allowed))


def converted(grammar: str) -> str:
    """Return a client's grammar in Lark.

    Raises:
        Refused: it is none, is beyond a limit, or has something that is not supported.
    """
    try:
        return normalised(grammar)
    except Unenforceable as error:
        raise Refused((), str(error)[:_LONGEST]) from None


def checked(schema: Schema, text: str, new_matcher: Compile | None) -> None:
    """Check an answer; with a compiler, only that it is the beginning of one that is allowed.

    Raises:
        Refused: with the path of the part of the schema that it does not keep to.
    """
    if new_matcher is not None:
        data = text.encode()
        if new_matcher(schema_grammar(schema)).prefix(data) != len(data):
            raise Refused((), "is not the beginning of an answer")
        return
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused((), "is not JSON") from None
    error = next(iter(_validator(schema).iter_errors(value)), None)
    if error is not None:
        raise Refused(tuple(map(str, error.schema_path)), "is not kept")


class Refused(Exception):
    """What is wrong with a schema or an answer, and at which path of the schema."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


def _validator(schema: Schema) -> Any:
    try:
        return jsonschema_rs.validator_for(
            dict(schema),
            validate_formats=False,
            retriever=_retrieved,
            # Linear in time, as the compilers' are.
            pattern_options=jsonschema_rs.RegexOptions(),
        )
    except (ValueError, jsonschema_rs.ValidationError) as error:
        path = tuple(map(str, getattr(error, "instance_path", ())))
        reason = getattr(error, "message", str(error)).partition("\n")[0]
        raise Refused(path, f"is no JSON schema: {reason}"[:_LONGEST]) from None


def _retrieved(uri: str) -> Any:
    raise ValueError(f"{uri} is not retrieved")


def _no_number(name: str) -> Any:
    raise ValueError(name)


def _located(schema: Schema, new_matcher: Compile) -> Path:
    """Return the path of the smallest subschema that cannot be compiled alone."""
    # Alone, but with all that its references may name.
    root, end = _moved(schema), time.monotonic() + _LOCATING_S
    path: Path = ()
    node: Any = schema
    while isinstance(node, Mapping):
        for below, child in children(cast("Schema", node)):
            alone = {"$ref": f"#/root{pointer((*path, *below))}", "root": root}
            if time.monotonic() > end:
                return path
            if new_matcher(schema_grammar(alone)).error:
                path, node = (*path, *below), child
                break
        else:
            return path
    return path


def _moved(schema: Schema) -> Any:
    """Return a copy for the key `root` of another schema, with references from there."""
    copy = json.loads(json.dumps(schema))
    pending = [copy]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            part = cast("dict[str, Any]", node)
            pending += [child for _, child in children(part)]
            part.pop("$id", None)
            if isinstance(reference := part.get("$ref"), str):
                part["$ref"] = f"#/root{reference[1:]}"
    return copy


def _reason(problem: str) -> str:
    """Return what a client can make use of in an error of llguidance."""
    head, _, rest = problem.partition("\n")
    if head.startswith("NoExtension"):
        return _NO_TEXT
    if "fuel" in head or "panic" in head or "too big" in head or "too complex" in head:
        return _TOO_MUCH
    details = [line for line in rest.splitlines() if line.startswith("error: ")]
    reason = details[0][7:] if details else head.partition("JSON schema: ")[2] or head
    return f"cannot be enforced: {reason.partition('. ')[0].strip().rstrip('.')}"[:_LONGEST]


def _reason_of_grammar(problem: str, regex: str) -> str:
    """Return what is wrong in a grammar, and where."""
    if (reason := _reason(problem)) in {_NO_TEXT, _TOO_MUCH}:
        return reason
    place = _PLACE.match(problem)
    if place is None:
        return reason
    details = [line[7:] for line in problem.splitlines() if line.startswith("error: ")]
    detail = details[0] if details else place[3].rpartition(" (in regex): ")[2].split("; ")[0]
    caret = _CARET.search(problem) if details else None
    if not regex:
        where = f" at line {int(place[1]) - 1}, column {place[2]}"
    else:
        where = f" at character {regex_position(regex, len(caret[1])) + 1}" if caret else ""
    return f"cannot be enforced: {detail}{where}"[:_LONGEST]


def _reply(job: Mapping[str, Any], new_matcher: Compile) -> dict[str, Any]:
    """Do a job and return its reply: empty, the converted grammar, or what is wrong."""
    cut, text = job.get("cut", True), job.get("text", "")
    try:
        if "grammar" in job:
            lark = converted(job["grammar"])
            followed(lark, text, new_matcher, cut=cut)
            if "text" not in job:
                rehearsed(lark, new_matcher)
            return {"lark": lark}
        if "lark" in job:
            followed(job["lark"], text, new_matcher, cut=cut, regex=job.get("regex", ""))
        elif "text" not in job:
            compiled(job["schema"], new_matcher)
        else:
            checked(job["schema"], text, new_matcher if cut else None)
    except Refused as refused:
        return {"path": refused.path, "reason": refused.reason}
    except MemoryError:
        return {"path": (), "reason": _TOO_MUCH}
    return {}


def _apart(job: Mapping[str, Any], new_matcher: Compile) -> dict[str, Any]:
    """Do a job in a process of its own, which its limits can end without this one."""
    receiver, sender = os.pipe()
    if (child := os.fork()) == 0:
        try:
            limit_job()
            os.write(sender, json.dumps(_reply(job, new_matcher)).encode())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as replies:
        reply = replies.read()
    os.waitpid(child, 0)
    return json.loads(reply) if reply else {"path": (), "reason": _TOO_MUCH}


def limit_job() -> None:
    """Limit memory, processor time and core dumps of this process, and end it with its parent."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        pages = int(File("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def main() -> None:
    """Do jobs until stdin ends. The argument is the library that compiles, if it is not ours."""
    new_matcher: Compile = Library(sys.argv[1]) if sys.argv[1:] else _Package
    # What libraries prepare at first use is shared by all jobs.
    compiled({}, new_matcher)
    for line in sys.stdin.buffer:
        job = json.loads(line)
        # The check of a whole answer by its schema compiles nothing.
        do = _reply if "schema" in job and not job.get("cut", True) else _apart
        reply = do(job, new_matcher)
        os.write(1, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
