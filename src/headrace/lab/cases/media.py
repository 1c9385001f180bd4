"""What the cases of images and of audio share: a request with media, and who takes none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.core.errors import RequestError, Unsupported
from headrace.core.media import Media, Pictures
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.lab.cases.subject import TOKENS, Declared, Reply, Subject, check, read, refusal

Add = Callable[[Pictures, bytes, str], Media]
"""Adds the bytes of a picture or a sound, with its place: `Pictures.add`, for one."""


def media_request(
    subject: Subject, add: Add, *parts: bytes | str, **fields: Any
) -> GenerateRequest:
    """Return a greedy request with a message of texts and media; bytes are media."""
    pictures = Pictures()
    content = tuple(
        part if isinstance(part, str) else add(pictures, part, f"messages[0].content[{place}]")
        for place, part in enumerate(parts)
    )
    given = {"max_tokens": TOKENS, "temperature": 0.0} | fields.pop("sampling", {})
    return GenerateRequest(
        messages=(Message("user", content),),
        media=pictures.data,
        sampling=Sampling(**subject.able(**given)),
        **fields,
    )


async def require(subject: Subject, request: GenerateRequest, name: str, *, able: bool) -> None:
    """Check that a model that is not `able` refuses media by their place.

    `request` has them in its second part, and `name` is what they are.

    Raises:
        Declared: it does, or the upstream refuses them.
    """
    if not able:
        error = await refusal(subject.backend.ask(request), Unsupported)
        check(error.param == "messages[0].content[1]", f"The error names {error.param}.")
        raise Declared(f"It takes no {name}, and names the first place of it.")
    if subject.is_remote:
        try:
            await read(subject.backend.ask(request))
        except RequestError as error:
            raise Declared(f"The upstream refuses {name}: {error.message}") from error


def prompt_tokens(reply: Reply) -> int:
    """Return the tokens of the prompt, with those of media."""
    return reply.finish.usage.prompt_tokens
