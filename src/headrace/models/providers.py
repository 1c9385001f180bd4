"""The known upstreams: the address, the variable of the key and the deviations of each.

An upstream that is compatible with one of these is used by that name and `base_url`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import msgspec

from headrace.core.model import Task

_BASIC = frozenset({"max_tokens", "temperature", "top_p"})
_PENALTIES = frozenset({"presence_penalty", "frequency_penalty"})
_OPENAI = _BASIC | _PENALTIES | {"seed", "logprobs", "logit_bias", "n"}
_OPEN = _OPENAI | {"top_k", "min_p", "repetition_penalty"}
_ALL = _OPEN | {"stop_token_ids", "ignore_eos", "min_tokens"}


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream and the fields that it honours; others are refused by name.

    `base_url` is None where each customer has one. `key` is the variable with the key, optional
    with `open`. `sampling` has fields of Sampling, and `n`; `renamed` maps them to the upstream's
    names in a chat. `stops` is the number of stop strings that it takes. `json` is whether an
    answer can follow a schema, be any JSON object, or neither; `structured_outputs` whether it
    can follow a regex, a choice or a grammar, in vLLM's field of that name. `asks_usage`: usage
    of a stream has to be requested by `stream_options`, a field that others may refuse.
    `embeddings` and `rerank` are its tasks beside generation; `switch` is the field that
    switches thinking, and `thinking_budget` whether it takes `thinking_token_budget`; with
    `base64` it can send vectors in that encoding. `images`: messages may have pictures; `audio`:
    they may have sounds, as `input_audio`. `extra` is added to each request. `otel_name` is its
    name in OpenTelemetry's conventions, where it differs. `checked` rows rest on the provider's
    documentation or on several programs that use it; the others on a claim of compatibility, taken
    narrowly.
    """

    title: str
    base_url: str | None
    key: str
    engine: str = "openai"
    open: bool = False
    key_header: str = "Authorization"
    sampling: frozenset[str] = _BASIC
    renamed: Mapping[str, str] = {}
    stops: int = 4
    json: Literal["schema", "object", "none"] = "object"
    switch: Literal["effort", "template", "type", "flag", "router"] = "effort"
    structured_outputs: bool = False
    developer: bool = False
    asks_usage: bool = True
    completions: bool = False
    token_prompts: bool = False
    template_options: bool = False
    embeddings: bool = False
    base64: bool = False
    rerank: bool = False
    tokenize: bool = False
    thinking_budget: bool = False
    images: bool = False
    audio: bool = False
    extra: Mapping[str, Any] = {}
    otel_name: str | None = None
    checked: bool = True

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that its models can have."""
        supported = {"generate": True, "embed": self.embeddings, "rerank": self.rerank}
        return tuple(task for task in get_args(Task) if supported[task])


_NEWER_NAME = {"max_tokens": "max_completion_tokens"}

PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        "openai": Provider(
            title="OpenAI",
            base_url="https://api.openai.com/v1",
            key="OPENAI_API_KEY",
            sampling=_OPENAI,
            renamed=_NEWER_NAME,
            json="schema",
            developer=True,
            completions=True,
            embeddings=True,
            base64=True,
            images=True,
            audio=True,
        ),
        "azure": Provider(
            title="Azure OpenAI",
            base_url=None,
            key="AZURE_OPENAI_API_KEY",
            key_header="api-key",
            sampling=_OPENAI,
            renamed=_NEWER_NAME,
            json="schema",
            developer=True,
            completions=True,
            embeddings=True,
            base64=True,
            otel_name="azure.ai.openai",
            images=True,
            audio=True,
        ),
        "deepseek": Provider(
            title="DeepSeek",
            base_url="https://api.deepseek.com/v1",
            key="DEEPSEEK_API_KEY",
            sampling=_BASIC | _PENALTIES | {"logprobs"},
            stops=16,
            switch="type",
        ),
        "moonshot": Provider(
            title="Moonshot",
            base_url="https://api.moonshot.cn/v1",
            key="MOONSHOT_API_KEY",
            sampling=_BASIC | _PENALTIES | {"n"},
            stops=5,
            otel_name="moonshot_ai",
            switch="type",
            images=True,
        ),
        "zhipu": Provider(
            title="Zhipu",
            base_url="https://open.bigmodel.cn/api/paas/v4",
            key="ZHIPU_API_KEY",
            stops=1,
            asks_usage=False,
            embeddings=True,
            rerank=True,
            switch="type",
            images=True,
        ),
        "dashscope": Provider(
            title="DashScope",
            base_url="https://dashscope.aliyuncs.com/compatible-mode/v1",
            key="DASHSCOPE_API_KEY",
            sampling=_BASIC | {"presence_penalty", "seed", "top_k"},
            embeddings=True,
            switch="flag",
            images=True,
        ),
        "siliconflow": Provider(
            title="SiliconFlow",
            base_url="https://api.siliconflow.cn/v1",
            key="SILICONFLOW_API_KEY",
            sampling=_BASIC | {"frequency_penalty", "top_k", "min_p", "n"},
            embeddings=True,
            rerank=True,
            switch="flag",
            images=True,
        ),
        "volcengine": Provider(
            title="Volcengine Ark",
            base_url="https://ark.cn-beijing.volces.com/api/v3",
            key="ARK_API_KEY",
            sampling=_BASIC | _PENALTIES | {"logprobs", "logit_bias"},
            embeddings=True,
            switch="type",
            images=True,
        ),
        "minimax": Provider(
            title="MiniMax",
            base_url="https://api.minimax.io/v1",
            key="MINIMAX_API_KEY",
            stops=0,
            json="none",
        ),
        "baichuan": Provider(
            title="Baichuan",
            base_url="https://api.baichuan-ai.com/v1",
            key="BAICHUAN_API_KEY",
            sampling=_BASIC | {"top_k"},
            stops=0,
            json="none",
            asks_usage=False,
            embeddings=True,
            checked=False,
        ),
        "yi": Provider(
            title="Yi",
            base_url="https://api.lingyiwanwu.com/v1",
            key="YI_API_KEY",
            stops=0,
            json="none",
            asks_usage=False,
            checked=False,
        ),
        "gemini": Provider(
            title="Gemini",
            base_url="https://generativelanguage.googleapis.com/v1beta/openai",
            key="GEMINI_API_KEY",
            sampling=_BASIC | {"n"},
            json="schema",
            embeddings=True,
            otel_name="gcp.gemini",
            images=True,
            audio=True,
        ),
        "mistral": Provider(
            title="Mistral",
            base_url="https://api.mistral.ai/v1",
            key="MISTRAL_API_KEY",
            sampling=_BASIC | _PENALTIES | {"seed", "n"},
            renamed={"seed": "random_seed"},
            json="schema",
            asks_usage=False,
            embeddings=True,
            otel_name="mistral_ai",
            images=True,
        ),
        "groq": Provider(
            title="Groq",
            base_url="https://api.groq.com/openai/v1",
            key="GROQ_API_KEY",
            sampling=_BASIC | {"seed"},
            renamed=_NEWER_NAME,
            json="schema",
            images=True,
        ),
        "xai": Provider(
            title="xAI",
            base_url="https://api.x.ai/v1",
            key="XAI_API_KEY",
            sampling=_OPENAI - {"logit_bias"},
            json="schema",
            otel_name="x_ai",
            images=True,
        ),
        "openrouter": Provider(
            title="OpenRouter",
            base_url="https://openrouter.ai/api/v1",
            key="OPENROUTER_API_KEY",
            sampling=_OPEN - {"n"},
            json="schema",
            completions=True,
            # Without it, fields that a model does not support are dropped silently.
            extra={"provider": {"require_parameters": True}},
            switch="router",
            images=True,
            audio=True,
        ),
        "together": Provider(
            title="Together",
            base_url="https://api.together.xyz/v1",
            key="TOGETHER_API_KEY",
            sampling=_OPEN - {"logprobs"},
            json="schema",
            completions=True,
            embeddings=True,
            rerank=True,
            checked=False,
            images=True,
        ),
        "fireworks": Provider(
            title="Fireworks",
            base_url="https://api.fireworks.ai/inference/v1",
            key="FIREWORKS_API_KEY",
            sampling=_OPEN,
            json="schema",
            completions=True,
            embeddings=True,
            checked=False,
            images=True,
        ),
        "ollama": Provider(
            title="Ollama",
            base_url="http://127.0.0.1:11434/v1",
            key="OLLAMA_API_KEY",
            open=True,
            sampling=_BASIC | _PENALTIES | {"seed", "logprobs"},
            json="schema",
            completions=True,
            embeddings=True,
            images=True,
        ),
        "lmstudio": Provider(
            title="LM Studio",
            base_url="http://127.0.0.1:1234/v1",
            key="LMSTUDIO_API_KEY",
            open=True,
            sampling=_BASIC | _PENALTIES | {"seed", "top_k", "logit_bias"},
            json="schema",
            completions=True,
            embeddings=True,
            images=True,
        ),
        "vllm": Provider(
            title="vLLM",
            base_url="http://127.0.0.1:8000/v1",
            key="VLLM_API_KEY",
            open=True,
            sampling=_ALL,
            stops=64,
            json="schema",
            structured_outputs=True,
            completions=True,
            token_prompts=True,
            template_options=True,
            embeddings=True,
            base64=True,
            rerank=True,
            tokenize=True,
            switch="template",
            images=True,
            audio=True,
        ),
        "headrace": Provider(
            title="Headrace",
            base_url="http://127.0.0.1:11511/v1",
            key="HEADRACE_API_KEY",
            open=True,
            sampling=_ALL,
            stops=16,
            json="schema",
            structured_outputs=True,
            developer=True,
            completions=True,
            token_prompts=True,
            template_options=True,
            embeddings=True,
            base64=True,
            rerank=True,
            tokenize=True,
            switch="template",
            thinking_budget=True,
            images=True,
            audio=True,
        ),
        "anthropic": Provider(
            title="Anthropic",
            base_url="https://api.anthropic.com",
            key="ANTHROPIC_API_KEY",
            engine="anthropic",
            sampling=frozenset({"max_tokens"}),
            stops=16,
            json="schema",
            tokenize=True,
            images=True,
        ),
    }
)
