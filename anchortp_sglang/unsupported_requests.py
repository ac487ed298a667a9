"""Request fields and admin routes of SGLang 0.5.23 that a recovery could not honour, as data.

Fields are those of ``sglang.srt.managers.io_struct.GenerateReqInput`` and keys of its
``sampling_params``; routes are those of ``sglang.srt.entrypoints.http_server``. A feature leaves
these tables when a test shows that it survives a fault. :mod:`anchortp_sglang.refusals` reads them.
"""

# GenerateReqInput fields that cannot be resumed, and what the client knows them as.
REQUEST_FIELDS = {
    "session_params": "a session",
    "session_id": "a session",
    "image_data": "a request with images",
    "video_data": "a request with video",
    "audio_data": "a request with audio",
    "need_wait_for_mm_inputs": "a request with multimodal inputs",
    "input_embeds": "a request that starts from embeddings (input_embeds)",
    "positional_embed_overrides": "a request with embedding overrides",
    "lora_path": "a request with a LoRA adapter",
    "lora_id": "a request with a LoRA adapter",
    "custom_logit_processor": "a custom logit processor",
    "return_hidden_states": "return_hidden_states",
    "return_routed_experts": "return_routed_experts",
    "return_indexer_topk": "return_indexer_topk",
    "return_entropy": "return_entropy",
    "return_sampling_mask": "return_sampling_mask",
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

# The same for keys of sampling_params; beam_width is judged by its value.
SAMPLING_KEYS = {
    "json_schema": "output constrained by a grammar (json_schema)",
    "regex": "output constrained by a grammar (regex)",
    "ebnf": "output constrained by a grammar (ebnf)",
    "structural_tag": "output constrained by a grammar (structural_tag)",
    "watermark": "a watermark",
}

# Admin routes whose effect on the ranks is gone after the next fault, or breaks the anchors' memory.
_WEIGHTS = "weights in the anchors are read-only and come from the checkpoint; restart with the new one"
_FORGOTTEN = "new ranks would not know of it after a fault"
ROUTES = {
    "/update_weights_from_disk": _WEIGHTS,
    "/update_weights_from_tensor": _WEIGHTS,
    "/update_weights_from_distributed": _WEIGHTS,
    "/update_weights_from_ipc": _WEIGHTS,
    "/begin_weight_update": _WEIGHTS,
    "/init_weights_update_group": _WEIGHTS,
    "/release_memory_occupation": "weights and KV live in the anchors and stay there",
    "/resume_memory_occupation": "weights and KV live in the anchors and stay there",
    "/init_weights_send_group_for_remote_instance": _FORGOTTEN,
    "/load_lora_adapter": _FORGOTTEN,
    "/load_lora_adapter_from_tensors": _FORGOTTEN,
    "/open_session": _FORGOTTEN,
    "/pause_generation": _FORGOTTEN,
    "/set_internal_state": _FORGOTTEN,
    "/add_external_corpus": _FORGOTTEN,
    "/pd_role_switch": _FORGOTTEN,
    "/hicache/storage-backend": _FORGOTTEN,
}
