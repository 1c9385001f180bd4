"""The fields of other APIs in requests of /v1/responses and /v1/messages; see `fields`."""

from __future__ import annotations

from headrace.api.fields import GENERATE, Peers, ignored, refused

_OF_CHATS: Peers = {
    **refused("reasoning_budget thinking_budget thinking_budget_tokens"),
    **refused("grammar regex ebnf", ""),
    **refused("structured_outputs guided_json guided_regex guided_choice guided_grammar"),
    **refused("add_generation_prompt include_reasoning", True),
    **refused("reasoning_format", "auto"),
    **refused("continue_final_message echo prompt_logprobs", False),
    **refused("suffix", ""),
}

STATELESS = "This server keeps no responses: send the earlier items in input"

_OF_RESPONSES = frozenset(
    ["metadata", "safety_identifier", "prompt_cache_key", "store", "user", "max_output_tokens"]
)

RESPONSES: Peers = {
    **{name: peer for name, peer in GENERATE.items() if name not in _OF_RESPONSES},
    **_OF_CHATS,
    **refused("conversation", instead=STATELESS),
    **refused("background", False),
    **refused("prompt moderation"),
    # What is kept, cached, counted or shortened.
    **ignored("context_management background_options prompt_cache_options access_programs image"),
    **ignored("personality"),
    **refused("messages", instead="Use input, or /v1/chat/completions"),
    **refused("max_completion_tokens", instead="Use max_output_tokens"),
    **refused("response_format", instead="Use text.format"),
    **refused("json_schema", instead="Use text.format"),
    **refused("reasoning_effort thinking think enable_thinking", instead="Use reasoning.effort"),
    **refused("thinking_token_budget repeat_penalty"),
    **refused("n best_of", 1),
    **refused("stop stop_token_ids", [], ""),
    **refused("logprobs", False, instead="Use include and top_logprobs"),
    **refused("logit_bias", {}),
    **refused("ignore_eos", False),
}

COUNT_TOKENS: Peers = {
    **{name: peer for name, peer in GENERATE.items() if name != "system"},
    **_OF_CHATS,
    **ignored("betas container context_management inference_geo speed diagnostics cache_control"),
    **ignored("user_profile_id workspace_id fallbacks stream stop_sequences"),
    **ignored("context_length keep_alive"),
    **refused("prompt", instead="Use messages"),
    **refused("response_format json_schema", instead="Use output_config.format"),
    **ignored("parallel_tool_calls stream_options"),
    **refused("reasoning_effort reasoning think enable_thinking", instead="Use thinking"),
    **refused("thinking_token_budget", instead="Use thinking"),
    **refused("max_completion_tokens", instead="Use max_tokens"),
    **refused("stop", [], "", instead="Use stop_sequences"),
    **refused("n best_of", 1),
    **refused("stop_token_ids logit_bias", [], {}),
    **refused("logprobs ignore_eos", False),
    **refused("top_logprobs repeat_penalty"),
}
MESSAGES: Peers = {
    name: peer
    for name, peer in COUNT_TOKENS.items()
    if name not in {"stream", "stop_sequences", "context_length", "keep_alive"}
}
BLOCK: Peers = ignored(
    "cache_control citations signature data context caller toolset_name file_id server_name"
    " encrypted_content transformations"
)
SOURCE: Peers = ignored("content")
MESSAGES_TOOL: Peers = ignored(
    "cache_control defer_loading input_examples eager_input_streaming allowed_callers max_uses"
    " allowed_domains blocked_domains user_location citations max_content_tokens max_characters"
    " display_width_px display_height_px display_number enable_zoom use_cache model"
    " mcp_server_name default_config configs response_inclusion max_tokens caching"
)
OUTPUT_CONFIG: Peers = ignored("task_budget")

INPUT_ITEM: Peers = {
    # What clients send back of an earlier answer, and the items of tools that a provider runs.
    **ignored("id status summary phase namespace caller async created_by internal_chat_message"),
    **ignored("action results queries code container_id outputs result error server_label tools"),
    **ignored("operation environment max_output_length execution approval_request_id approve"),
    **ignored("reason pending_safety_checks acknowledged_safety_checks actions"),
    # Of the openai package's own objects.
    **ignored("async_ parsed_arguments"),
}
INPUT_PART: Peers = ignored(
    "annotations logprobs parsed detail file_data file_url filename prompt_cache_breakpoint"
)
RESPONSE_REASONING: Peers = {
    **ignored("generate_summary context mode"),
    **refused("enabled", True),
    **refused("max_tokens"),
}
# Fields of tools that a provider runs, which are left out as a whole; hints.
RESPONSE_TOOL: Peers = ignored(
    "defer_loading allowed_callers output_schema async user_location search_context_size filters"
    " search_content_types external_web_access vector_store_ids max_num_results ranking_options"
    " container server_label server_url server_description connector_id authorization headers"
    " allowed_tools require_approval tunnel_id background input_fidelity input_image_mask model"
    " moderation output_compression output_format partial_images quality size action svg"
    " display_height display_width environment execution image_settings return_token_budget"
)
