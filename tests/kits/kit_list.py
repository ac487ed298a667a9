"""Which tests of ``sglang.test.kits`` are run, and why the others are not. Each is matched by exactly one pattern."""

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

MODE = os.environ.get("ANCHORTP_KITS", "quick")
"""quick, all, or stock: all of them on stock SGLang."""
STOCK = MODE == "stock"

QUICK = [
    "abort_timeout_kit.AbortAllMixin.test_abort_all",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_count_tokens*",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_error_*",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_in_messages_system_role",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_max_tokens",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_simple_messages*",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_raw_http_streaming",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_tool_result_image_content_conversion",
    "basic_api_contract_kit.BasicAPIContractMixin.*",
    "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_determinism_temp_zero",
    "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_max_token_one",
    "json_constrained_kit.JSONConstrainedMixin.test_json_invalid",
    "matched_stop_kit.MatchedStopMixin.test_finish_length",
    "spec_server_kits.SpecCorrectnessKit.test_batch_generation",
    "spec_server_kits.SpecCorrectnessKit.test_first_token_finish",
    "spec_server_kits.SpecLogprobKit.test_logprob_start_len",
    "spec_server_kits.SpecLogprobKit.test_logprob_decode_match_prefill",
    "spec_server_kits.SpecLogprobKit.test_token_ids_logprob_ragged",
    "spec_server_kits.SpecSamplingMaskKit.test_sampling_mask",
]
"""Run by ``make test``."""

SLOW = [
    "abort_timeout_kit.RunningTimeoutTwoWaveMixin.test_running_timeout_no_crash",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_content_blocks_message",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_multi_turn_messages",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_raw_http_non_streaming",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_stop_sequences",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_stream_*",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_system_message_*",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_temperature",
    "anthropic_messages_kit.AnthropicMessagesMixin.test_top_p_and_top_k",
    "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_ascii_ratio",
    "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_no_repetition_blowup",
    "basic_scheduler_stress_kit.BasicSchedulerStressMixin.test_long_prompt",
    "kl_divergence_kit.KLDivergenceMixin.*",
    "pause_generation_kit.*",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_email",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_greeting",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_number",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_phone",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_date",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_hex_color",
    "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_all_optional_function_params",
    "json_mode_kit.*",
    "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_email",
    "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_greeting",
    "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_number",
    "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_phone",
    "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_date",
    "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_hex_color",
    "spec_server_kits.SpecFeatureKit.test_constrained_decoding",
    "reasoning_kit.ReasoningTokenUsageMixin.test_reasoning_tokens_non_thinking",
    "reasoning_kit.ReasoningTokenUsageMixin.test_reasoning_tokens_non_thinking_stream",
    "reasoning_kit.SeparateReasoningMixin.test_streaming_separate_reasoning_false",
    "reasoning_kit.SeparateReasoningMixin.test_nonstreaming_separate_reasoning_false",
    "spec_server_kits.SpecCorrectnessKit.test_eos_token",
    "spec_server_kits.SpecFeatureKit.test_radix_attention",
    "spec_server_kits.SpecFeatureKit.test_request_abort",
    "spec_server_kits.SpecLogprobKit.test_logprob_match",
    "spec_server_kits.SpecLogprobKit.test_logprob_mixed",
    "spec_server_kits.SpecPenaltyKit.test_penalty_mixed",
    "unified_radix_cache_kit.UnifiedRadixTreeTestMixin.test_multiturn_*",
]
"""Run as well with ANCHORTP_KITS=all."""

SKIPPED = {
    "judges what a real model says; stock fails it here too": [
        "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_capital_france",
        "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_basic_math",
        "basic_decode_correctness_kit.BasicDecodeCorrectnessMixin.test_color_completion",
        "basic_scheduler_stress_kit.BasicSchedulerStressMixin.test_streaming_response",
        "basic_scheduler_stress_kit.BasicSchedulerStressMixin.test_concurrent_requests",
    ],
    "random weights never end an answer, nor say the stop string": [
        "matched_stop_kit.MatchedStopMixin.test_finish_stop_*",
    ],
    "needs a model that thinks": [
        "reasoning_kit.ReasoningTokenUsageMixin.test_reasoning_tokens_thinking",
        "reasoning_kit.ReasoningTokenUsageMixin.test_reasoning_tokens_thinking_stream",
        "reasoning_kit.ReasoningTokenUsageMixin.test_reasoning_tokens_generate_exact_count",
        "reasoning_kit.SeparateReasoningMixin.test_*_separate_reasoning_true*",
    ],
    "needs a data set from the hub, or one that evaluates": [
        "eval_accuracy_kit.*",
        "lm_eval_kit.*",
        "mmmu_vlm_kit.*",
        "spec_server_kits.SpecAccuracyKit.*",
        "spec_server_kits.SpecPerfKit.*",
        "unified_radix_cache_kit.UnifiedRadixTreeTestMixin.test_gsm8k",
        "unified_radix_cache_kit.AccuracyTwoPassMixin.test_gsm8k_two_passes",
    ],
    "needs a GPU": ["fwd_occupancy_kit.*"],
    "random weights fill a string of JSON, or a number, up to the limit of tokens": [
        "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_complex_json",
        "ebnf_constrained_kit.EBNFConstrainedMixin.test_ebnf_generate_custom_log_format",
        "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_complex_json",
        "regex_constrained_kit.RegexConstrainedMixin.test_regex_generate_custom_log_format",
        "json_constrained_kit.JSONConstrainedMixin.test_json_generate",
        "json_constrained_kit.JSONConstrainedMixin.test_json_openai",
        "json_constrained_kit.JSONConstrainedMixin.test_mix_json_and_other",
    ],
    "needs speculative decoding, which a start is refused for": [
        "spec_server_kits.SpecGrammarKit.*",
        "spec_decoding_kit.*",
        "spec_server_kits.SpecCorrectnessKit.test_acc_length",
        "spec_server_kits.SpecParityKit.*",
    ],
    "needs a pair of prefill and decode servers, which a start is refused for": ["pd_parity_kit.*"],
    "needs a hierarchical cache, which a start is refused for": [
        "unified_radix_cache_kit.AccuracyTwoPassMixin.test_l3_prefetch_full_prefix_hit_after_flush"
    ],
    "needs a hybrid model (Mamba), which a start is refused for": ["prefix_cache_branching_kit.*"],
    "needs a server with SGLANG_REQ_WAITING_TIMEOUT and --max-running-requests 1": [
        "abort_timeout_kit.WaitingTimeoutMixin.test_waiting_timeout"
    ],
    "hidden states of all tokens, which a request is refused for": ["spec_server_kits.SpecHiddenStatesKit.*"],
    "sessions, which a request is refused for": ["streaming_session_kit.*"],
}


PATTERNS = (*QUICK, *SLOW, *(pattern for left_out in SKIPPED.values() for pattern in left_out))


def matching(pattern: str, tests: Iterable[str]) -> list[str]:
    return [test for test in tests if fnmatchcase(test, pattern)]


def places(test: str) -> list[str]:
    """The patterns that match a test."""
    return [pattern for pattern in PATTERNS if fnmatchcase(test, pattern)]


def chosen(tests: Iterable[str]) -> list[str]:
    """What to run in this mode."""
    patterns = QUICK if MODE == "quick" else (*QUICK, *SLOW)
    return [test for test in tests if any(fnmatchcase(test, pattern) for pattern in patterns)]
