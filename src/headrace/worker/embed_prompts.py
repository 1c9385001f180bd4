"""Prompts that embedding models want before a text, such as `query: `, by name."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from headrace.core.errors import ConfigError, InvalidRequest, Unsupported
from headrace.core.model import InputType, ModelFile, ModelSpec
from headrace.core.request import EmbedRequest

# The names that models give to the prompts of each kind of input, as in sentence-transformers'
# encode_query and encode_document, and in the model cards of EmbeddingGemma, E5 and Nomic.
_NAMES: dict[InputType, tuple[str, ...]] = {
    "query": ("query", "search_query", "Retrieval-query"),
    "document": ("document", "passage", "corpus", "search_document", "Retrieval-document"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
    "similarity": ("similarity", "STS", "sts", "text-matching"),
}
_OF_SEARCH: tuple[InputType, ...] = ("query", "document")


class EmbedPrompts(NamedTuple):
    """The prompts of a model by name, and the one for requests that name none.

    `are_fixed` means that all texts must have the same one.
    """

    texts: dict[str, str] = {}  # noqa: RUF012 - never changed
    default: str | None = None
    are_fixed: bool = False

    def text(self, name: str | None, input_type: InputType | None) -> str:
        """Return the text before the inputs of a request, "" for none.

        Raises:
            InvalidRequest: the model has no such prompt.
            Unsupported: another one than the default is asked for, and it is fixed.
        """
        text = self._text(name, input_type)
        if self.are_fixed and text != self._default():
            raise Unsupported(
                "The model leaves its prompt out of the vector, and has one for all requests: the "
                "setting prompt_name.",
                param="input_type" if name is None else "prompt_name",
            )
        return text

    def _text(self, name: str | None, input_type: InputType | None) -> str:
        if name is not None:
            if name not in self.texts:
                raise InvalidRequest(
                    f"The model has no prompt {name!r}; it has {self._known()}.",
                    param="prompt_name",
                )
            return self.texts[name]
        if input_type is None:
            return self._default()
        for known in _NAMES[input_type]:
            if known in self.texts:
                return self.texts[known]
        # A model with prompts for one side of a search alone takes the other as it is. One whose
        # prompts are all empty makes no difference between kinds of inputs.
        sided = any(known in self.texts for kind in _OF_SEARCH for known in _NAMES[kind])
        if (sided and input_type in _OF_SEARCH) or (self.texts and not any(self.texts.values())):
            return ""
        raise InvalidRequest(
            f"The model has no prompt for {input_type}; it has {self._known()}. The model's "
            "setting prompts adds some.",
            param="input_type",
        )

    def _default(self) -> str:
        return self.texts[self.default] if self.default else ""

    def _known(self) -> str:
        return ", ".join(sorted(self.texts)) or "none"

    def applied(self, request: EmbedRequest) -> EmbedRequest:
        """Return a request with its prompt before each text; token ids are left as they are.

        Raises:
            InvalidRequest, Unsupported: as `text`.
        """
        prompt = self.text(request.prompt_name, request.input_type)
        if not prompt and request.prompt_name is request.input_type is None:
            return request
        inputs = tuple(prompt + item if isinstance(item, str) else item for item in request.inputs)
        return msgspec.structs.replace(request, inputs=inputs, prompt_name=None, input_type=None)


def embed_prompts(spec: ModelSpec, file: ModelFile) -> EmbedPrompts:
    """Return the prompts of a model: those of its folder, and over them those of its settings.

    Raises:
        ConfigError: the prompt for all requests is none of them.
    """
    texts = {**file.prompts, **spec.prompts}
    default = spec.prompt_name or file.default_prompt
    if default and (spec.task or file.task) == "rerank":
        raise ConfigError("Prompts of a model that ranks are not supported.")
    if default is not None and default not in texts:
        names = ", ".join(sorted(texts)) or "none"
        raise ConfigError(f"prompt_name: the model has no prompt {default!r}; it has {names}.")
    return EmbedPrompts(texts, default)
