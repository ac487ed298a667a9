"""Request fields and admin routes of SGLang 0.5.23 that a recovery could not honour, as data.

:mod:`anchortp_sglang.admission.checks` reads the tables. Fields are those of
``sglang.srt.managers.io_struct.GenerateReqInput`` and keys of its ``sampling_params``; routes are those of
``sglang.srt.entrypoints.http_server``. A feature leaves these tables when a test shows that it survives a fault.
"""

# GenerateReqInput's fields that cannot be resumed: (field, its name for the client).
REQUEST_FIELDS = {
    "session_params": "a session",
    "image_data": "a request with images",
    "video_data": "a request with video",
    "audio_data": "a request with audio",
    "need_wait_for_mm_inputs": "a request with multimodal inputs",
    "input_embeds": "a request that starts from embeddings (input_embeds)",
    "positional_embed_overrides": "a request with embedding overrides",
    "lora_id": "a LoRA adapter named by SGLang's own id instead of lora_path",
    "return_routed_experts": "return_routed_experts",
    "return_indexer_topk": "return_indexer_topk",
    "max_thinking_tokens": "max_thinking_tokens",
    "multi_item_delimiter_indices": "multi-item scoring",
    "token_indices_to_pool": "pooling at token positions",
    "watermark": "a watermark",
    "bootstrap_host": "a request of a prefill/decode pair",
    "bootstrap_port": "a request of a prefill/decode pair",
    "bootstrap_room": "a request of a prefill/decode pair",
    "bootstrap_pair_key": "a request of a prefill/decode pair",
    "decode_tp_size": "a request of a prefill/decode pair",
    "disagg_prefill_dp_rank": "a request of a prefill/decode pair",
}

# Keys of sampling_params that cannot be resumed. beam_width is judged by its value, and so are return_hidden_states and
# custom_logit_processor among the fields.
SAMPLING_KEYS = {
    "watermark": "a watermark",
}

# Routes whose effect on the ranks is gone after the next fault, that break the anchors' memory, or that can end a rank
# by a client's arguments. A path stands for all of its methods.
_WEIGHTS = "weights in the anchors are read-only and come from the checkpoint; restart with the new one"
_MEMORY = "weights and KV live in the anchors and stay there"
_FORGOTTEN = "new ranks would not know of it after a fault"
_ONE_GENERATION = "what ranks record ends with them at the next fault, and a bad argument would end them at once"
_SHARDS = "ranks may hold unequal shards of a weight, and a bad argument would end them"
_FEATURE = "it belongs to a feature that anchortp-sglang does not support"
ROUTES = {
    "/update_weights_from_disk": _WEIGHTS,
    "/update_weights_from_tensor": _WEIGHTS,
    "/update_weights_from_distributed": _WEIGHTS,
    "/update_weights_from_ipc": _WEIGHTS,
    "/begin_weight_update": _WEIGHTS,
    "/end_weight_update": _WEIGHTS,
    "/init_weights_update_group": _WEIGHTS,
    "/destroy_weights_update_group": _WEIGHTS,
    "/update_weight_version": _WEIGHTS,
    "/release_memory_occupation": _MEMORY,
    "/resume_memory_occupation": _MEMORY,
    "/weights_checker": _SHARDS,
    "/get_weights_by_name": _SHARDS,
    "/init_weights_send_group_for_remote_instance": _FORGOTTEN,
    "/send_weights_to_remote_instance": _FORGOTTEN,
    "/get_remote_instance_transfer_engine_info": _FORGOTTEN,
    "/remote_instance_transfer_engine_info": _FORGOTTEN,
    "/load_lora_adapter_from_tensors": "its tensors are handles of a process that may end before the next fault;"
    " load the adapter from a folder",
    "/open_session": _FORGOTTEN,
    "/close_session": _FORGOTTEN,
    "/set_internal_state": _FORGOTTEN,
    "/slow_down": _FORGOTTEN,
    "/start_profile": _ONE_GENERATION,
    "/stop_profile": _ONE_GENERATION,
    "/start_expert_distribution_record": _ONE_GENERATION,
    "/stop_expert_distribution_record": _ONE_GENERATION,
    "/dump_expert_distribution_record": _ONE_GENERATION,
    "/dumper/{method}": _ONE_GENERATION,
    "/add_external_corpus": _FEATURE,
    "/remove_external_corpus": _FEATURE,
    "/list_external_corpora": _FEATURE,
    "/pd_role_switch": _FEATURE,
    "/hicache/storage-backend": _FEATURE,
    "/hicache/storage-backend/clear": _FEATURE,
    "/get_hicache_l3_cache_layout": _FEATURE,
    "/scale_elastic_ep": _FEATURE,
}

# Routes that survive a fault: main answers them itself, or they become requests or messages of the list below.
_SERVED_ROUTES = """
    / /ready /ping /health /health_generate /get_model_info /model_info /get_server_info /server_info /v1/loads
    /is_scaling_elastic_ep /openapi.json /docs /docs/oauth2-redirect /redoc /metrics
    /flush_cache /abort_request /pause_generation /continue_generation /configure_logging /set_trace_level /freeze_gc
    /generate /encode /classify /v1/completions /v1/chat/completions /v1/embeddings /v1/classify /v1/score
    /v1/decisions /v1/responses /v1/responses/{response_id} /v1/responses/{response_id}/cancel /v1/rerank
    /v1/messages /v1/messages/count_tokens /v1/systemone /v1/audio/transcriptions /v1/realtime
    /api/chat /api/generate /api/tags /api/show /invocations /vertex_generate
    /tokenize /v1/tokenize /detokenize /v1/detokenize /parse_function_call /separate_reasoning
    /v1/models /v1/models/{model:path} /load_lora_adapter /unload_lora_adapter
"""
SERVED_ROUTES = frozenset(_SERVED_ROUTES.split())

# Messages (classes of ``managers/io_struct.py``) that TokenizerManager may send to the ranks; all others are refused.
# What they leave in the ranks (pauses, log levels, frozen garbage, adapters), main repeats to a new generation.
_SERVED_MESSAGES = """
    TokenizedGenerateReqInput BatchTokenizedGenerateReqInput AbortReq FlushCacheReqInput GetInternalStateReq
    ConfigureLoggingReq FreezeGCReq ShutdownReq PauseGenerationReqInput ContinueGenerationReqInput
    LoadLoRAAdapterReqInput UnloadLoRAAdapterReqInput
"""
SERVED_MESSAGES = frozenset(_SERVED_MESSAGES.split())
