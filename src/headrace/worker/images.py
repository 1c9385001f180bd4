"""Images of a request: whether the model takes them, and their markers in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.model import Capabilities
from headrace.core.request import CountRequest, GenerateRequest, Message


def check_images(
    request: GenerateRequest | CountRequest, capabilities: Capabilities, name: str
) -> None:
    """Check that the model `name` takes images, if there is one.

    Raises:
        Unsupported: it takes none, with the place of the first; or the prompt is to be scored.
    """
    if not capabilities.vision and (place := next(_places(request.messages or ()), None)):
        raise Unsupported(f"{name or 'This model'} takes no images.", param=place)
    generates = isinstance(request, GenerateRequest)
    if generates and request.media and request.prompt_candidates is not None:
        raise Unsupported(
            "Log-probabilities of a prompt with images are not available.", param="prompt_logprobs"
        )


def check_markers(text: str, request: GenerateRequest | CountRequest, marker: str) -> None:
    """Check that a prompt has one marker for each image.

    Raises:
        InvalidRequest: the template leaves one out, or a text has the marker itself.
    """
    images = sum(1 for _ in _places(request.messages or ()))
    if images and text.count(marker) != images:
        raise InvalidRequest(
            "The chat template does not show each image once, or a text has the model's marker of "
            f"an image, {marker}.",
            param="messages",
        )


def _places(messages: Sequence[Message]) -> Iterator[str]:
    for index, message in enumerate(messages):
        if not isinstance(message.content, str):
            for number, part in enumerate(message.content):
                if not isinstance(part, str):
                    yield part.place or f"messages[{index}].content[{number}]"
