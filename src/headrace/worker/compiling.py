"""The process that compiles schemas and checks answers, which `worker/compiler.py` starts.

What a client's schema makes a compiler do cannot be foreseen, and native code cannot be stopped
from outside. So it runs here first, with limits of memory and time that the kernel keeps. Jobs and
replies are lines of JSON.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import sys
import time
from collections.abc import Mapping, Set
from pathlib import Path as File
from typing import Any, cast

import jsonschema_rs

from headrace.core import confine
from headrace.core.endless import circular, endless
from headrace.core.schema import Path, Schema, children, pointer
from headrace.machine import die_with_parent
from headrace.text.grammar import HEADER, regex_position, schema_grammar
from headrace.text.lark import Unenforceable, normalised
from headrace.text.numbers import inexact
from headrace.text.quoted import quoted
from headrace.worker.exact import INEXACT, Refused, check_bounds, check_multiples
from headrace.worker.matchers import END, Compile, Library, from_package

MEMORY = 192 << 20
"""Bytes that a job may take, beside what the libraries take."""
CPU_S = 2
"""Seconds of a core that a job may take."""
MAX_QUOTED = 1 << 20
"""Characters of a grammar of text inside a JSON string."""
_LOCATING_S = 1.0
_LONGEST = 300
_TOO_MUCH = "takes too much to compile"
_NO_TEXT = "allows no text"
_ENDLESS = "has no answer that ends"
_BEYOND_FLOATS = 10**309
_REHEARSED, _REHEARSAL_S = 300, 0.2
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")
_CARET = re.compile(r"^    ( *)\^", re.MULTILINE)


def compiled(schema: Schema, new_matcher: Compile) -> None:
    """Compile a schema.

    Raises:
        Refused: it is no schema, or cannot be enforced.
    """
    _validator(schema)
    if problem := new_matcher(schema_grammar(schema)).error:
        raise Refused(_located(schema, new_matcher), _reason(problem))
    _check_parts(schema, new_matcher)


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
        allowed = [byte for byte in range(END) if following >> byte & 1]
        if matcher.error or time.process_time() - began > _REHEARSAL_S:
            raise Refused((), _TOO_MUCH)
        if not allowed:
            return
        matcher.take(draw.choice(allowed))


def callable_(tools: Mapping[str, Schema], new_matcher: Compile) -> None:
    """Check of the schema of each tool what the grammar of their calls does not show.

    Raises:
        Refused: one is no schema, allows no arguments, or cannot be enforced; begins with its name.
    """
    for name, schema in tools.items():
        try:
            _validator(schema)
            problem = new_matcher(schema_grammar(schema)).error
            if problem and _reason(problem) == _NO_TEXT:
                raise Refused((), _NO_TEXT)
            _check_parts(schema, new_matcher)
        except Refused as refused:
            raise Refused((name, *refused.path), refused.reason) from None


def converted(grammar: str) -> str:
    """Return a client's grammar in Lark.

    Raises:
        Refused: it is none, is beyond a limit, or has something that is not supported.
    """
    try:
        return normalised(grammar)
    except Unenforceable as error:
        raise Refused((), str(error)[:_LONGEST]) from None


def in_string(grammar: str, also: str, new_matcher: Compile) -> str:
    """Return the body of a grammar of text inside a JSON string, for one that compiles.

    The characters of `also` are escaped too.

    Raises:
        Refused: it has something that cannot be inside a string, or takes too much.
    """

    def matched(regex: str, signs: Set[str]) -> Set[str]:
        matcher = new_matcher(f"{HEADER}\nstart: /{regex}/\n")
        following = 0 if matcher.error else matcher.following()
        return {sign for sign in signs if following >> ord(sign) & 1}

    try:
        body = quoted(grammar, matched, also)
    except Unenforceable as error:
        raise Refused((), str(error)[:_LONGEST]) from None
    if len(body) > MAX_QUOTED:
        raise Refused((), _TOO_MUCH)
    if problem := new_matcher(f"{HEADER}\n{body}\n").error:
        raise Refused((), _reason(problem))
    rehearsed(f"{HEADER}\n{body}\n", new_matcher)
    return body


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
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        raise Refused((), "is not JSON") from None
    error = next(iter(_validator(schema).iter_errors(value)), None)
    if error is not None:
        raise Refused(tuple(map(str, error.schema_path)), "is not kept")


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


def _check_parts(schema: Schema, new_matcher: Compile) -> None:
    """Check what compilers find out when an answer reaches it, or not at all.

    Raises:
        Refused: a part has no finite answer, refers to itself, or has a number that is not
            enforced.
    """
    if (path := endless(schema)) is not None:
        raise Refused(path, _ENDLESS)
    if (path := circular(schema)) is not None:
        raise Refused(path, "refers to itself for the same value")
    pending: list[tuple[Path, Any]] = [((), schema)]
    while pending:
        path, part = pending.pop()
        if isinstance(part, Mapping):
            for place, value in inexact(cast("Schema", part)):
                raise Refused((*path, *place), f"is {value}, {INEXACT}")
            check_bounds(path, cast("Schema", part), new_matcher)
            below = children(cast("Schema", part))
            pending += [((*path, *place), child) for place, child in below]
    check_multiples(schema, new_matcher)


def _retrieved(uri: str) -> Any:
    raise ValueError(f"{uri} is not retrieved")


def _finite(text: str) -> float:
    """Return a number; one beyond all floats, which the validator does not take, as an integer."""
    value = float(text)
    return value if math.isfinite(value) else int(math.copysign(1, value)) * _BEYOND_FLOATS


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
    try:
        if "grammar" in job or "lark" in job:
            return _reply_of_grammar(job, new_matcher)
        if "text" not in job:
            compiled(job["schema"], new_matcher)
        else:
            checked(job["schema"], job["text"], new_matcher if job.get("cut", True) else None)
    except Refused as refused:
        return {"path": refused.path, "reason": refused.reason}
    except MemoryError:
        return {"path": (), "reason": _TOO_MUCH}
    return {}


def _reply_of_grammar(job: Mapping[str, Any], new_matcher: Compile) -> dict[str, Any]:
    """Do a job with a client's grammar, or with one that the worker has made."""
    text, regex = job.get("text", ""), job.get("regex", "")
    is_clients = "grammar" in job
    lark = converted(job["grammar"]) if is_clients else job["lark"]
    followed(lark, text, new_matcher, cut=job.get("cut", True), regex=regex)
    if "quoted" in job:
        return {"lark": in_string(job.get("grammar", lark), job["quoted"], new_matcher)}
    if "text" not in job:
        if is_clients or regex:
            rehearsed(lark, new_matcher)
        callable_(job.get("tools", {}), new_matcher)
    return {"lark": lark} if is_clients else {}


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
    """Limit memory and processor time of this process, and end it with its parent."""
    die_with_parent()
    _limit(resource.RLIMIT_CPU, CPU_S)
    if sys.platform == "linux":
        pages = int(File("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY)


def _limit(kind: int, most: int) -> None:
    """Set a limit, or keep to a lower one of the operator."""
    if (allowed := resource.getrlimit(kind)[1]) != resource.RLIM_INFINITY:
        most = min(most, allowed)
    resource.setrlimit(kind, (most, most))


def main() -> None:
    """Do jobs until stdin ends. The argument is the library that compiles, if it is not ours."""
    new_matcher: Compile = Library(sys.argv[1]) if sys.argv[1:] else from_package
    # What libraries prepare at first use is shared by all jobs.
    compiled({}, new_matcher)
    confine.give_up_privileges()
    confine.restrict(())
    for line in sys.stdin.buffer:
        job = json.loads(line)
        # The check of a whole answer by its schema compiles nothing.
        do = _reply if "schema" in job and not job.get("cut", True) else _apart
        reply = do(job, new_matcher)
        os.write(1, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
