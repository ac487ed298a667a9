"""Flags of SGLang 0.5.23 that a recovery could not honour, as data for :mod:`anchortp_sglang.admission.checks`.

A rule names fields of ``sglang.srt.server_args.ServerArgs``. A feature leaves this table when a test shows that it
survives a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FlagRule:
    """A rule that refuses ``fields`` unless they are off or have one of the ``allowed`` values."""

    fields: str  # names separated by spaces
    why: str
    way_out: str = "leave it out"
    allowed: tuple[Any, ...] = ()


FLAG_RULES: tuple[FlagRule, ...] = (
    # --- the shape of the server: one tensor-parallel group on one machine -------------------------
    FlagRule(
        "dp_size attn_dp_size enable_dp_attention enable_dp_lm_head",
        "a recovery replaces the ranks of one tensor-parallel group, not of several replicas",
        "run one server per replica behind a router",
        allowed=(1,),
    ),
    FlagRule(
        "pp_size nnodes node_rank enable_dynamic_chunking",
        "ranks must be tensor-parallel ranks of one machine",
        "use --tp-size on one machine",
        allowed=(1,),
    ),
    FlagRule(
        "dcp_size attn_cp_size enable_prefill_cp enable_cp_decode_attn_tp enable_kv_cache_sharding "
        "enable_dsa_cache_layer_split enable_cp_tp_group_sharing",
        "KV split along the context is not rebuilt after a fault",
        allowed=(1,),
    ),
    FlagRule(
        "moe_dp_size dwdp_size moe_a2a_backend moe_dense_tp_size elastic_ep_backend "
        "enable_elastic_expert_backup ep_join_mode enable_paged_experts kt_weight_path",
        "the plan decides which rank holds an expert",
        allowed=(1,),
    ),
    FlagRule(
        # ExpertLocationMetadata, eplb/expert_location.py:86 and :256; deepseek.py:112 of eplb_algorithms
        "ep_num_redundant_experts ep_dispatch_algorithm",
        "SGLang's tables of copies (ExpertLocationMetadata) need the same number of experts on each rank, which a loss "
        "makes unequal",
        "leave it out; --init-expert-location with logical_count spreads hot experts without copies",
    ),
    FlagRule(
        # ExpertLocationUpdater, eplb/expert_location_updater.py
        "enable_eplb",
        "it exchanges experts in place while serving, and weights in the anchors are read-only",
        "leave it out; --init-expert-location with logical_count spreads hot experts from the start",
    ),
    FlagRule(
        "enable_attn_tp_input_scattered enable_layernorm_sp enable_tp_lm_head_all_to_all "
        "enable_dense_mlp_attn_tp enable_shared_experts_attn_tp shared_experts_tp_size "
        "enable_scattered_sconv enable_two_batch_overlap enable_single_batch_overlap",
        "it divides work evenly over the ranks, whose shares may be unequal",
    ),
    FlagRule(
        "enable_symm_mem enable_nccl_nvls enable_mscclpp enable_torch_symm_mem "
        "enable_quant_communications enable_flashinfer_allreduce_fusion "
        "flashinfer_allreduce_fusion_backend enable_aiter_allreduce_fusion",
        "collectives that register memory, or whose rounding depends on tp_size, are untested in a recovery",
    ),
    FlagRule(
        "dist_init_addr gated_launch_port",
        "each generation of ranks meets at its own address",
    ),
    FlagRule(
        "use_ray custom_sigquit_handler sidecar",
        "the recovery coordinator starts the ranks and handles their death itself",
    ),
    FlagRule(
        "tokenizer_worker_num detokenizer_worker_num",
        "open requests are replayed from one tokenizer process and one detokenizer process",
        "use 1",
        allowed=(1,),
    ),
    FlagRule(
        "smg_grpc_mode grpc_mode grpc_port enable_http2",
        "requests are held and replayed behind the HTTP/1.1 server only",
    ),
    FlagRule(
        "skip_tokenizer_init",
        "delivered tokens are counted and checked on their way through the detokenizer",
        "let the server load the tokenizer; requests may still send input_ids",
    ),
    # --- what is served -----------------------------------------------------------------------------
    FlagRule(
        "is_embedding enable_mis prefill_only_disable_kv_cache dllm_algorithm",
        "only token-by-token generation is resumed after a fault",
        "serve it with stock SGLang",
    ),
    FlagRule(
        "disaggregation_mode enable_pd_role_switch enable_pdmux encoder_only language_only "
        "encoder_urls encoder_register_urls",
        "prefill, decode and encoder must be one server",
    ),
    FlagRule(
        "enable_multimodal enable_mm_global_cache enable_prefix_mm_cache mm_enable_dp_encoder "
        "enable_broadcast_mm_inputs_process",
        "multimodal inputs are not kept for the replay",
    ),
    FlagRule(
        "speculative_algorithm speculative_draft_model_path decoupled_spec_role "
        "enable_multi_layer_eagle enable_return_aux_hidden_states",
        # reconstruct_indices_from_tree_mask (ngram_worker), copy_all_layer_kv_cache_cpu (memory_pool, with any draft
        # model), build_tree_kernel_efficient_cpu and verify_tree_greedy_cpu (spec_tree), assign_extend_cache_locs_cpu
        "on a CPU SGLang drafts and verifies with kernels of sgl_kernel's CPU build, which the released wheel lacks; "
        "on GPUs draft models and their KV are not rebuilt after a fault",
    ),
    FlagRule(
        "enable_lora_overlap_loading",
        "it loads adapters beside the loop, which a change of ranks would not wait for",
    ),
    FlagRule(
        "enable_return_routed_experts enable_return_indexer_topk enable_watermark watermark_config "
        "enable_streaming_session",
        "the state it keeps per request cannot be resumed after a fault yet",
    ),
    FlagRule(
        # XGrammarGrammarBackend.apply_vocab_mask raises on the CPU, for every request
        "enable_strict_thinking",
        "SGLang masks tokens for it on GPUs only, where no recovery has been tried with it",
    ),
    FlagRule(
        "return_hidden_states_mode",  # enable_return_hidden_states becomes "full"
        "hidden states of tokens that a client has would be computed again after a fault, and all of them sent again",
        "use --return-hidden-states-mode last",
        allowed=("last",),
    ),
    # --- weights ------------------------------------------------------------------------------------
    FlagRule(
        "quantization quantization_param_path modelopt_quant quantize_and_serve "
        "modelopt_checkpoint_restore_path rl_quant_profile",
        "quantized weights are not cut into shares yet",
        "use an unquantized checkpoint",
    ),
    FlagRule(
        "load_format",
        "lost shares are read back as slices of safetensors files",
        "convert the checkpoint to safetensors and use --load-format auto",
        allowed=("auto", "safetensors", "dummy"),
    ),
    FlagRule(
        "delete_ckpt_after_loading",
        "the checkpoint must stay: shards of a lost device are read from it",
    ),
    FlagRule(
        "model_impl",
        "shares are known for SGLang's own model code only",
        "use --model-impl sglang",
        allowed=("auto", "sglang"),
    ),
    FlagRule(
        "model_loader_extra_config custom_weight_loader weight_cache_mode startup_weight_load_mode "
        "decrypted_config_file remote_instance_weight_loader_seed_instance_ip "
        "remote_instance_weight_loader_start_seed_via_transfer_engine modelexpress_config "
        "checkpoint_engine_wait_weights_before_ready rl_on_policy_target",
        "weights are loaded into the anchors from the local checkpoint, once",
        allowed=("serial",),
    ),
    FlagRule(
        "enable_memory_saver enable_weights_cpu_backup cpu_offload_gb offload_group_size ple_offload_embedding",
        "weights and KV live in the anchors and stay there",
        allowed=(-1,),
    ),
    # --- KV and scheduling --------------------------------------------------------------------------
    FlagRule(
        "enable_hierarchical_cache hicache_storage_backend enable_unified_cache_external_linker "
        "enable_hisparse enable_lmcache enable_flexkv",
        "a second tier of KV would keep slot numbers that a recovery changes",
    ),
    FlagRule(
        "radix_cache_backend enable_session_radix_cache",
        "only the built-in prefix tree is rebuilt from the slot table",
    ),
    FlagRule(
        "enable_page_major_kv_layout enable_unified_memory kv_canary",
        "KV buffers of another layout, or with extra columns, are not kept in the anchors",
    ),
    FlagRule(
        "kv_events_config",
        "a router that follows KV events would not learn what a fault removed",
    ),
    FlagRule(
        "enable_torch_compile enable_nvidia_megakernel forward_hooks msprobe_dump_config",
        "every generation of ranks would compile or hook the model again before its first token",
    ),
)

# Flags that SGLang 0.5.23 does not derive from the field's name.
FLAG_OF_FIELD = {
    "ep_join_mode": "--elastic-ep-join-mode",
    "custom_sigquit_handler": "custom_sigquit_handler",
    "enable_cp_tp_group_sharing": "enable_cp_tp_group_sharing",
}

# Features that environment variables switch on instead of flags (sglang.srt.environ.Envs).
ENVIRONMENT = {
    "SGLANG_RUST_SERVER": "open requests of the Rust server cannot be replayed",
    "SGLANG_GRPC_PORT": "requests are held and replayed behind the HTTP/1.1 server only",
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "each generation of ranks meets at its own address",
}
