"""The provider `proxy/headrace` of DB-GPT: models of a Headrace service.

Importing the module registers it; `hook` has DB-GPT do so.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Optional

from dbgpt.core import ModelMetadata, ModelOutput, ModelRequest
from dbgpt.core.interface.media import MediaContent
from dbgpt.model.proxy.base import register_proxy_model_adapter
from dbgpt.model.proxy.llms.chatgpt import (
    OpenAICompatibleDeployModelParameters,
    OpenAILLMClient,
    chatgpt_generate_stream,
)
from dbgpt.util.tracer import DBGPT_TRACER_SPAN_ID, root_tracer
from openai import APIError

# Each with the value that has no effect, which not every engine accepts.
_PASSED_ON = {"temperature": None, "top_p": 1, "stop": ""}


@dataclass
class HeadraceDeployModelParameters(OpenAICompatibleDeployModelParameters):
    """What a model of a service is deployed with."""

    provider: str = "proxy/headrace"

    # DB-GPT reads the types, and knows no other form of them.
    api_base: Optional[str] = field(  # noqa: UP045
        default="${env:HEADRACE_API_BASE:-http://127.0.0.1:11511/v1}",
        metadata={"help": "The URL of the service, with /v1."},
    )

    api_key: Optional[str] = field(  # noqa: UP045
        default="${env:HEADRACE_API_KEY:-none}",
        metadata={"help": "A key of the service; any word if it needs none.", "tags": "privacy"},
    )


class HeadraceLLMClient(OpenAILLMClient):
    """A client of a service, which is OpenAI's API and more."""

    @classmethod
    def param_class(cls) -> type[HeadraceDeployModelParameters]:
        """Return the class of the parameters."""
        return HeadraceDeployModelParameters

    @classmethod
    def generate_stream_function(cls) -> Any:
        """Return the function by which DB-GPT's worker generates."""
        return chatgpt_generate_stream

    def _build_request(self, request: ModelRequest, stream: bool | None = False) -> dict[str, Any]:
        given = {name: getattr(request, name) for name in _PASSED_ON}
        payload = {k: v for k, v in given.items() if v is not None and v != _PASSED_ON[k]}
        payload |= {"model": request.model or self.default_model, "stream": bool(stream)}
        if request.max_new_tokens:
            payload["max_tokens"] = request.max_new_tokens
        if stream:
            payload["stream_options"] = {"include_usage": True}
        if span := root_tracer.get_current_span_id():
            payload["extra_headers"] = {DBGPT_TRACER_SPAN_ID: span}
        return payload | self._openai_kwargs

    async def generate_v1(
        self, messages: list[dict[str, Any]], payload: dict[str, Any]
    ) -> ModelOutput:
        """Return one answer; DB-GPT's client turns an exception into an output."""
        answer = await self.client.chat.completions.create(messages=messages, **payload)
        choice = answer.choices[0]
        thinking = getattr(choice.message, "reasoning_content", None) or ""
        usage = _usage(answer.usage)
        return _output(choice.message.content or "", thinking, usage, choice.finish_reason)

    async def generate_stream_v1(
        self, messages: list[dict[str, Any]], payload: dict[str, Any]
    ) -> AsyncIterator[ModelOutput]:
        """Yield the answer so far, and at its end its reason and its token counts."""
        text = thinking = ""
        reason = usage = None
        try:
            async for chunk in await self.client.chat.completions.create(
                messages=messages, **payload
            ):
                usage = _usage(chunk.usage) or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    thinking += getattr(choice.delta, "reasoning_content", None) or ""
                    reason = choice.finish_reason or reason
                    yield _output(text, thinking)
        except APIError as error:
            yield ModelOutput(text=str(error), error_code=1)
            return
        yield _output(text, thinking, usage, reason or "stop")

    async def count_token(self, model: str, prompt: str) -> int:
        """Count with the tokenizer of the model."""
        root = str(self.client.base_url).rstrip("/").removesuffix("/v1")
        body = {"model": model, "prompt": prompt, "add_special_tokens": False}
        answer = await self.client.post(f"{root}/tokenize", body=body, cast_to=object)
        return int(answer["count"])

    async def get_context_length(self) -> int:
        """Return the model's own context length; without the service what was configured."""
        try:
            card = await self.client.models.retrieve(self.default_model)
        except APIError:
            return self.context_length
        return int(getattr(card, "context_length", None) or self.context_length)


def _output(text: str, thinking: str, usage: Any = None, reason: str | None = None) -> ModelOutput:
    """Return an output; there is always a text, which clients look for."""
    content = [MediaContent.build_text(text)]
    if thinking:
        content.insert(0, MediaContent.build_thinking(thinking))
    # DB-GPT's API server knows these two.
    known = reason if reason in (None, "length") else "stop"
    return ModelOutput(error_code=0, content=content, usage=usage, finish_reason=known)


def _usage(usage: Any) -> dict[str, int] | None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return usage and {name: getattr(usage, name) for name in names}


def hook(section: dict[str, Any], **params: Any) -> dict[str, Any]:
    """Register the provider: the `path` of a hook in DB-GPT's configuration."""
    return section


register_proxy_model_adapter(HeadraceLLMClient, supported_models=[ModelMetadata(model="smollm2")])
