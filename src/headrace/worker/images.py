"""Images and sounds of a request: whether the model takes them, and their markers in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.media import Audio, Media
from headrace.core.model import Capabilities
from headrace.core.request import CountRequest, GenerateRequest, Message


def check_media(
    request: GenerateRequest | CountRequest, capabilities: Capabilities, name: str
) -> None:
    """Check that the model `name` takes the images and sounds, if there are any.

    Raises:
        Unsupported: it does not, with the place of the first; or the prompt is to be scored.
    """
    for part, place in _places(request.messages or ()):
        is_audio = isinstance(part, Audio)
        if not (capabilities.audio if is_audio else capabilities.vision):
            kind = "audio" if is_audio else "images"
            raise Unsupported(f"{name or 'This model'} takes no {kind}.", param=place)
    generates = isinstance(request, GenerateRequest)
    if generates and request.media and request.prompt_candidates is not None:
        raise Unsupported(
            "Log-probabilities of a prompt with images or audio are not available.",
            param="prompt_logprobs",
        )


def check_markers(text: str, request: GenerateRequest | CountRequest, marker: str) -> None:
    """Check that a prompt has one marker for each image and sound.

    Raises:
        InvalidRequest: the template leaves one out, or a text has the marker itself.
    """
    count = sum(1 for _ in _places(request.messages or ()))
    if count and text.count(marker) != count:
        raise InvalidRequest(
            "The chat template does not show each image and sound once, or a text has the model's "
            f"marker of them, {marker}.",
            param="messages",
        )


def _places(messages: Sequence[Message]) -> Iterator[tuple[Media, str]]:
    for index, message in enumerate(messages):
        if not isinstance(message.content, str):
            for number, part in enumerate(message.content):
                if not isinstance(part, str):
                    yield part, part.place or f"messages[{index}].content[{number}]"
