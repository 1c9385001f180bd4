"""The fields of other servers' APIs that have no meaning here, and unknown fields.

Each struct of a request names its table. A value that changes nothing is accepted; any other is
refused by the field's name, as it would change the answer. A field of no table is unknown: the
setting `unknown_fields` says what becomes of it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import msgspec
from msgspec import inspect

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.core.wording import described, fields_of, parts_of, struct_of

OnUnknown = Literal["ignore", "warn", "refuse"]
ReasoningField = Literal["reasoning_content", "reasoning", "both"]

_SHOWN = 8
_MOST = 64
_MAX_NAME = 64
_NEAR = 0.75
_NOT_PLAIN = re.compile(r"[^\x21-\x2b\x2d-\x7e]")


class Peer(NamedTuple):
    """A field of another API: the values with no effect beside null (`None`: all), and a hint."""

    harmless: tuple[Any, ...] | None = ()
    instead: str = ""


def ignored(names: str) -> dict[str, Peer]:
    """Return fields that are accepted with any value."""
    return dict.fromkeys(names.split(), Peer(None))


def refused(names: str, *harmless: Any, instead: str = "") -> dict[str, Peer]:
    """Return fields that are accepted with null and the `harmless` values only."""
    return dict.fromkeys(names.split(), Peer(harmless, instead))


_ignored, _refused = ignored, refused

Peers = Mapping[str, Peer]

_NESTED = "Its entries are fields of the request itself"
# llama-server's own order of samplers, which its page sends, and that of its editors.
_SAMPLERS = ["dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
_LETTERS = ("edskypmxt", "dskypmxt", "edkypmxt", "dkypmxt")

_OF_ANY: Peers = {
    # The user, billing, storage, caches and urgency.
    **_ignored("user metadata store service_tier safety_identifier request_id priority cache_salt"),
    **_ignored("prompt_cache_key prompt_cache_retention"),
    **_refused("options extra_body parameters", {}, instead=_NESTED),
    **_refused("truncate_prompt_tokens"),
    **_refused("mm_processor_kwargs lora lora_path", {}, []),
}

_OF_TEMPLATE: Peers = {
    **_refused("chat_template", instead="The model's setting chat_template sets one"),
    **_refused("documents", []),
    **_refused("functions", []),
}

GENERATE: Peers = {
    **_OF_ANY,
    **_OF_TEMPLATE,
    # llama-server: where and how it computes, and what is reported beside the answer.
    **_ignored("cache_prompt id_slot n_keep n_discard timings_per_token"),
    **_ignored("mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold dry_base"),
    **_ignored("dry_allowed_length dry_penalty_last_n dry_sequence_breakers"),
    **_refused("samplers", [], "", _SAMPLERS, ["penalties", *_SAMPLERS], *_LETTERS),
    **_refused("t_max_predict_ms", 0, -1),
    # Penalties count the whole text; 64 is the default of llama-server and Ollama.
    **_refused("repeat_last_n", 64, -1),
    **_refused("parse_tool_calls", True),
    **_refused("disable_parallel_tool_use", False, instead="Use parallel_tool_calls"),
    **_refused("n_predict max_new_tokens num_predict", instead="Use max_tokens"),
    **_refused("max_output_tokens max_tokens_to_sample max_length", instead="Use max_tokens"),
    **_refused("stop_sequences stopping_strings stop_words", [], instead="Use stop"),
    **_refused("do_sample", True, instead="Use temperature 0"),
    **_refused("num_beams", 1),
    **_refused("num_ctx", instead="Use context_length"),
    **_refused("mirostat dynatemp_range xtc_probability dry_multiplier top_a tfs", 0),
    **_refused("typical_p tfs_z typical epsilon_cutoff", 1),
    **_refused("top_n_sigma n_probs", 0, -1),
    **_refused("min_keep", 0, 1),
    **_refused("stop_regex", ""),
    **_refused("return_tokens return_progress post_sampling_probs", False),
    # vLLM and SGLang.
    **_refused("return_token_ids return_tokens_as_token_ids", False),
    **_refused("return_hidden_states return_meta_info", False),
    **_refused("use_beam_search early_stopping include_stop_str_in_output no_stop_trim", False),
    **_refused("skip_special_tokens spaces_between_special_tokens detokenize", True),
    **_refused("add_special_tokens", True),
    **_refused("length_penalty", 1),
    **_refused("allowed_token_ids bad_words logits_processors custom_params", [], {}),
    **_ignored("guided_decoding_backend"),
    **_refused("guided_whitespace_pattern custom_logit_processor structural_tag"),
    **_refused("grammar_lazy", False),
    **_refused("grammar_triggers", []),
    **_refused("kv_transfer_params vllm_xargs prompt_embeds"),
    **_refused("separate_reasoning stream_reasoning", True),
    # OpenAI and those that speak its protocol.
    **_ignored("verbosity"),
    **_refused("audio prediction web_search_options"),
    **_refused("modalities", ["text"]),
    **_refused("function_call", "none"),
    **_refused("format", "", instead="Use response_format"),
    **_refused("system template", "", instead="Use a message with the role system"),
    **_refused("context images", []),
    **_refused("raw safe_prompt", False),
    **_refused("random_seed", instead="Use seed"),
    **_refused("provider models route transforms plugins"),
}

CHAT: Peers = {
    **GENERATE,
    **_refused("best_of", 1),
    **_refused("echo", False),
    **_refused("suffix", "", instead="Use /v1/completions"),
    **_refused("prompt", instead="Use messages, or /v1/completions"),
    **_refused("input", instead="Use messages"),
}

COMPLETIONS: Peers = {
    **GENERATE,
    **_refused("messages", instead="Use prompt, or /v1/chat/completions"),
    **_refused("add_generation_prompt", True),
    **_refused("continue_final_message", False),
    **_refused("top_logprobs", instead="Use logprobs with a number"),
    **_ignored("parallel_tool_calls"),
    **_refused("tools", [], instead="Use /v1/chat/completions"),
    **_refused("tool_choice", "none", "auto"),
    **_refused("reasoning_effort reasoning think thinking enable_thinking", False, "none"),
    **_refused("thinking_token_budget thinking_budget_tokens thinking_budget reasoning_budget"),
    # Only chats have thinking apart from the answer.
    **_ignored("include_reasoning reasoning_format"),
    **_refused("max_completion_tokens", instead="Use max_tokens"),
    **_ignored("chat_template_kwargs"),
}

_OF_LLAMA = frozenset(["n_predict", "n_probs", "samplers", "t_max_predict_ms", "return_tokens"])
LLAMA: Peers = {
    **{name: peer for name, peer in COMPLETIONS.items() if name not in _OF_LLAMA},
    # Nothing is limited before the first token.
    **_ignored("t_max_prompt_ms n_cache_reuse sse_ping_interval return_tokens"),
    **_refused("n_cmpl", 1),
    **_refused("image_data multimodal_data", []),
    **_refused("suffix", "", instead="Use /infill"),
    **_refused("echo", False),
    **_refused("logprobs", instead="Use n_probs"),
}
EXTRA: Peers = _ignored("time")
TEMPLATE: Peers = {**_OF_ANY, **_OF_TEMPLATE}

MESSAGE: Peers = {
    # What clients send back of an earlier answer, and hints for caches.
    **_ignored("cache_control id status tool_name"),
    **_refused("images annotations", []),
    **_refused("prefix partial", False, instead="Use continue_final_message"),
    **_refused("audio function_call"),
}

TOOL_CALL: Peers = _ignored("index cache_control")
TOOL: Peers = _ignored("cache_control defer_loading")
REASONING: Peers = _ignored("summary generate_summary")
PART: Peers = {
    **_ignored("cache_control annotations"),
    **_refused("video_url file input_image", instead="Parts are text, image_url or input_audio"),
}
STREAM_OPTIONS: Peers = {
    **_ignored("include_obfuscation"),
    **_refused("continuous_usage_stats", False),
}
JSON_SCHEMA: Peers = _ignored("description")
STRUCTURED_OUTPUTS: Peers = {
    **_ignored("disable_fallback disable_any_whitespace"),
    **_refused("whitespace_pattern structural_tag"),
    **_refused("disable_additional_properties", False),
}

_OF_TEXTS: Peers = {
    **{name: peer for name, peer in _OF_ANY.items() if name != "truncate_prompt_tokens"},
    **_refused("use_activation activation add_special_tokens", True),
}

EMBED: Peers = {
    **_OF_TEXTS,
    **_refused("normalize embed_normalize", True, instead="Use normalized"),
    **_refused("truncation_direction", "right", "Right"),
    **_refused("embedding_type", "float", instead="Use encoding_format"),
    **_refused("embedding_types output_dtype", "float", ["float"], instead="Use encoding_format"),
    **_refused("output_dimension", instead="Use dimensions"),
    **_refused("late_chunking return_multivector", False),
    **_refused("prompt", instead="Use input"),
    **_refused("texts images inputs messages", [], instead="Use input"),
    **_refused("instruction query_prefix", instead="Use prompt_name"),
}

RERANK: Peers = {
    **_OF_TEXTS,
    **_refused("max_chunks_per_doc max_tokens_per_doc rank_fields"),
    **_refused("top_k", instead="Use top_n"),
    **_refused("instruction instruct"),
    **_refused("raw_scores", False),
    **_refused("truncation_direction", "right", "Right"),
}
RELEVANCE: Peers = {**RERANK, **_refused("truncate_prompt_tokens"), **_refused("truncate", True)}

SCORE: Peers = {
    **_OF_TEXTS,
    **_refused("queries items documents data_1 data_2", instead="Use text_1 and text_2"),
    **_refused("instruction"),
}

TOKENIZE: Peers = {
    **_OF_ANY,
    **_OF_TEMPLATE,
    **_refused("with_pieces return_token_strs", False),
    **_refused("parse_special", True),
    **_refused("text", instead="Use content or prompt"),
}

OLLAMA: Peers = _ignored("user insecure")
_OLLAMA_GENERATE: Peers = {
    **OLLAMA,
    **_ignored("shift truncate"),
    **_refused("template", "", instead="The model's own template is used"),
    **_refused("width height steps"),
}
OLLAMA_CHAT: Peers = {
    **_OLLAMA_GENERATE,
    **_refused("prompt", "", instead="Use messages, or /api/generate"),
    **_refused("images", [], instead="They are part of a message"),
    **_refused("tool_choice", "auto", "none"),
}
OLLAMA_GENERATE: Peers = {
    **_OLLAMA_GENERATE,
    **_ignored("context"),
    **_refused("messages tools", [], instead="Use /api/chat"),
}
# The context and the threads are the server's own; what is not here is unknown.
OLLAMA_OPTIONS: Peers = _ignored(
    "num_ctx num_keep num_batch num_gpu main_gpu num_thread numa use_mmap use_mlock low_vram "
    "f16_kv logits_all vocab_only embedding_only num_gqa rope_frequency_base rope_frequency_scale "
    "penalize_newline repeat_last_n"
)
OLLAMA_MESSAGE: Peers = {}
OLLAMA_CALL: Peers = _ignored("type index")
OLLAMA_FUNCTION: Peers = _ignored("index description")

DETOKENIZE: Peers = {**_OF_ANY, **_refused("skip_special_tokens", False)}


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the structs of a request, whose `peers` are the fields of other APIs.

    The decoder stops at a field that a struct does not have, and `known` sorts them; a request
    without such a field costs nothing more.
    """

    peers: ClassVar[Peers] = {}


def bodies(root: type[Body] = Body) -> Iterator[type[Body]]:
    """Yield `root` and every struct below it."""
    yield root
    for child in root.__subclasses__():
        yield from bodies(child)


class Unknown(NamedTuple):
    """An unknown field: its place (`messages[].nmae`), and the nearest known name."""

    place: str
    near: str = ""

    def __str__(self) -> str:
        """Name the field in printable ASCII, without commas."""
        place = _NOT_PLAIN.sub("?", self.place[:_MAX_NAME])
        return f"{place} (did you mean {self.near}?)" if self.near else place


def known(data: Any, kind: Any, place: str = "") -> tuple[Any, tuple[Unknown, ...]]:
    """Return decoded JSON without the fields that `kind` does not have, and the unknown ones.

    `place` is that of the data within a request.

    Raises:
        Unsupported: a field of another API would change the answer.
    """
    unknown: dict[str, Unknown] = {}
    return _known(data, described(kind), place, unknown), tuple(unknown.values())


def warning(unknown: Sequence[Unknown]) -> str:
    """Return one line that names unknown fields, for a header."""
    more = len(unknown) - _SHOWN
    names = ", ".join(map(str, unknown[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
    return f"unknown field{'s' if len(unknown) > 1 else ''}: {names}"


def check(unknown: Sequence[Unknown]) -> None:
    """Refuse unknown fields.

    Raises:
        InvalidRequest: there is one.
    """
    if unknown:
        place, near = unknown[0].place[:_MAX_NAME], unknown[0].near
        hint = f" Did you mean {near}?" if near else ""
        raise InvalidRequest(f"{place}: This field is unknown.{hint}", param=place)


def _known(data: Any, kind: inspect.Type, place: str, unknown: dict[str, Unknown]) -> Any:
    if isinstance(data, dict):
        struct = struct_of(kind, data)
        if struct is None or not struct.forbid_unknown_fields:
            return cast("Any", data)
        items = cast("dict[str, Any]", data).items()
        return dict(_fields(items, struct.cls, place, unknown))
    if isinstance(data, list):
        arrays = [part for part in parts_of(kind) if isinstance(part, inspect.ListType)]
        if arrays and struct_of(arrays[0].item_type):
            items = enumerate(cast("list[Any]", data))
            inner = arrays[0].item_type
            return [_known(item, inner, f"{place}[{index}]", unknown) for index, item in items]
    return cast("Any", data)


def _fields(
    items: Any, struct: type[msgspec.Struct], place: str, unknown: dict[str, Unknown]
) -> Iterator[tuple[str, Any]]:
    fields = fields_of(struct)
    peers: Peers = struct.peers if issubclass(struct, Body) else {}
    for name, value in items:
        full = f"{place}.{name}".lstrip(".")
        if kind := fields.get(name):
            yield name, _known(value, kind, full, unknown)
        elif peer := peers.get(name):
            _check_peer(full, peer, value)
        elif len(unknown) < _MOST:
            shown = re.sub(r"\[\d+\]", "[]", full)
            if shown not in unknown:
                near = _near(name, fields) if len(unknown) < _SHOWN else ""
                unknown[shown] = Unknown(shown, near)


def _check_peer(place: str, peer: Peer, value: Any) -> None:
    if value is None or peer.harmless is None or value in peer.harmless:
        return
    hint = f" {peer.instead}." if peer.instead else ""
    raise Unsupported(f"{place} is not supported here.{hint}", param=place)


def _near(name: str, fields: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name[:_MAX_NAME].lower(), fields, 1, _NEAR)
    return matches[0] if matches else ""
