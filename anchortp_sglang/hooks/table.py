"""The table of all hooks into SGLang, and the function that installs them."""

from __future__ import annotations

import logging
from collections.abc import Collection

from anchortp_sglang.admission import hooks as admission
from anchortp_sglang.admission import long_texts, ollama
from anchortp_sglang.hooks import install, manifest, preload
from anchortp_sglang.hooks.install import Hook
from anchortp_sglang.platforms.cpu import groups, latent_attention, request_rows, short_extends, topology, unpinned
from anchortp_sglang.platforms.cpu import hooks as cpu
from anchortp_sglang.platforms.cuda import collectives, graphs
from anchortp_sglang.rank import main as rank_main
from anchortp_sglang.rank import penalties, seeds
from anchortp_sglang.rank.kv import pool as kv_pool
from anchortp_sglang.rank.kv import slot_table_hooks
from anchortp_sglang.rank.weights import adapters, config, experts, head_norms, loader
from anchortp_sglang.recovery import hooks as main
from anchortp_sglang.recovery.processes import detokenizer

logger = logging.getLogger(__name__)

_SRT = "sglang.srt."
_ENGINE = _SRT + "entrypoints.engine."
_HTTP = _SRT + "entrypoints.http_server."
_TM = _SRT + "managers.tokenizer_manager."
_TM_CLASS = _TM + "TokenizerManager."
_DETOKENIZER = _SRT + "managers.detokenizer_manager.DetokenizerManager."
_SCHEDULER = _SRT + "managers.scheduler.Scheduler."
_RECEIVER = _SRT + "managers.scheduler_components.request_receiver.SchedulerRequestReceiver."
_MEMORY = _SRT + "mem_cache."
_LORA = _SRT + "lora.lora_manager.LoRAManager."

HOOKS: tuple[Hook, ...] = (
    # Unequal shards: what a rank sees of the model, and where its parameters lie.
    Hook(
        _SRT + "configs.model_config.ModelConfig.from_server_args",
        "after",
        config.after_from_server_args,
        "each rank's config is scaled so that SGLang's even split yields the rank's own share",
    ),
    Hook(
        _SRT + "configs.update_config.adjust_config_with_unaligned_cpu_tp",
        "around",
        config.around_unaligned_cpu_tp,
        "on CPU it would pad the heads and columns of unequal shares",
    ),
    Hook(
        _SRT + "utils.common.make_layers",
        "around",
        config.around_make_layers,
        "a layer sees its own sizes where heads or experts rotate over the layers",
    ),
    Hook(
        _SRT + "model_loader.loader.get_model_loader",
        "around",
        loader.around_get_model_loader,
        "parameters are bound to the anchor's memory instead of being loaded",
    ),
    Hook(
        _SRT + "layers.moe.fused_moe_triton.layer.FusedMoE.__init__",
        "around",
        experts.around_fused_moe_init,
        "a rank has the experts that the plan gives it",
    ),
    Hook(
        _SRT + "eplb.expert_location.ExpertLocationMetadata._init_common",
        "around",
        experts.around_init_expert_location,
        "its tables assume equal shares of experts",
    ),
    Hook(
        _SRT + "layers.moe.fused_moe_native.moe_forward_native",
        "around",
        experts.around_moe_forward_native,
        "on CPU it fails on the id of an expert that another rank has",
    ),
    Hook(
        _SRT + "models.deepseek_v2.DeepseekV2MLP.__init__",
        "around",
        experts.around_deepseek_mlp_init,
        "a rank's share of the shared experts is not a multiple of its share of the others",
    ),
    Hook(
        _SRT + "models.olmo2.Olmo2Attention.__init__",
        "after",
        head_norms.after_olmo2_attention_init,
        "norms over all heads: a rank has the weights of its own heads",
    ),
    Hook(
        _SRT + "models.olmo2.Olmo2Attention._apply_qk_norm",
        "around",
        head_norms.around_apply_qk_norm,
        "norms over all heads: it would gather parts of equal size",
    ),
    Hook(
        _LORA + "init_lora_modules",
        "after",
        adapters.after_init_lora_modules,
        "a rank has the rows or columns of an adapter that belong to its own share",
    ),
    # KV in the anchors' memory, and the slot table by which it is found again.
    Hook(
        _MEMORY + "memory_pool.MHATokenToKVPool._create_buffers_normal",
        "around",
        kv_pool.around_create_buffers,
        "KV buffers are views of the anchor's memory",
    ),
    Hook(
        _MEMORY + "memory_pool.MLATokenToKVPool._create_buffers",
        "around",
        kv_pool.around_create_latent_buffers,
        "buffers of latents (multi-head latent attention) are views of the anchor's memory",
    ),
    Hook(
        _MEMORY + "kv_cache_configurator.KVCacheConfigurator._resolve_memory_pool_config",
        "around",
        kv_pool.around_resolve_memory_pool_config,
        "every rank has the planned number of slots, however many heads it holds",
    ),
    Hook(
        _MEMORY + "allocator.token.TokenToKVPoolAllocator.free",
        "before",
        slot_table_hooks.before_free,
        "a freed slot's entry leaves the slot table",
    ),
    Hook(
        _MEMORY + "unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        "around",
        slot_table_hooks.around_checkpoint_into_tree,
        "slots after tokens that another request has computed as well keep their place in the slot table",
    ),
    Hook(
        _SRT + "models.gemma3_causal.Gemma3TextScaledWordEmbedding.forward",
        "after",
        slot_table_hooks.after_whole_embedding,
        "no rank writes KV before rank 0 has freed and allocated the slots",
    ),
    Hook(
        _MEMORY + "allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids",
        "before",
        slot_table_hooks.before_release_page_ids,
        "freed pages of several slots leave the slot table",
    ),
    Hook(
        _SCHEDULER + "_copy_result_to_cpu",
        "before",
        slot_table_hooks.before_copy_result_to_cpu,
        "with the overlap schedule, a step's slots are read without waiting for the next step",
    ),
    Hook(
        _SCHEDULER + "process_batch_result",
        "before",
        slot_table_hooks.before_process_batch_result,
        "the KV of a finished forward pass is entered in the slot table",
    ),
    Hook(
        _SRT + "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
        "process_batch_result_prefill",
        "before",
        rank_main.before_process_batch_result_prefill,
        "the tokens that resumed requests reuse are counted for the status",
    ),
    Hook(
        _SCHEDULER + "flush_cache",
        "after",
        slot_table_hooks.after_flush_cache,
        "a flushed cache does not come back with the next generation",
    ),
    Hook(
        _MEMORY + "kv_cache_builder.build_kv_cache",
        "after",
        slot_table_hooks.after_build_kv_cache,
        "a new generation starts with the prefix tree of the last one",
    ),
    # Ranks: the gate between generations, and requests that go on.
    Hook(
        _RECEIVER + "_pull_raw_reqs",
        "after",
        rank_main.after_pull_raw_reqs,
        "requests left over for a dead rank 0 are dropped; every loop of the scheduler sends a heartbeat",
    ),
    Hook(
        _SCHEDULER + "_create_generation_req",
        "after",
        rank_main.after_create_generation_req,
        "a resumed request starts after its last delivered token",
    ),
    Hook(
        _SCHEDULER + "_add_request_to_queue",
        "around",
        rank_main.around_add_request_to_queue,
        "a resumed request's grammar follows its tokens; input logprobs that its client has are not computed again; it "
        "fills no queue",
    ),
    Hook(
        _SRT + "sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__",
        "after",
        penalties.after_penalizers,
        "penalties count the tokens a resumed request already has",
    ),
    Hook(
        _SRT + "managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        "around",
        penalties.around_cumulate_penalty_output_tokens,
        "with the overlap schedule it counts a token late or twice, so that tokens depend on what else is scheduled",
    ),
    Hook(
        _SRT + "managers.overlap_utils.resolve_forward_inputs",
        "after",
        penalties.after_resolve_forward_inputs,
        "with the overlap schedule, penalties count a token when the device has it",
    ),
    Hook(
        _SRT + "layers.sampler.Sampler._sample_from_probs",
        "around",
        seeds.around_sample_from_probs,
        "what a request draws with a seed of its own would depend on the other requests of its batch",
    ),
    # The detokenizer's fence.
    Hook(
        _DETOKENIZER + "init_ipc_channels",
        "after",
        detokenizer.after_init_ipc_channels,
        "its input socket's connections are watched, so that a drain is known to be complete",
    ),
    Hook(
        _DETOKENIZER + "init_request_dispatcher",
        "after",
        detokenizer.after_init_request_dispatcher,
        "it answers fences",
    ),
    # Main: launch, signals, TokenizerManager's traffic.
    Hook(
        _ENGINE + "Engine._launch_scheduler_processes",
        "replace",
        main.launch_scheduler_processes,
        "ranks are forked from the zygote, one generation after the other",
    ),
    Hook(
        _ENGINE + "Engine._launch_detokenizer_subprocesses",
        "replace",
        main.launch_detokenizer,
        "the detokenizer is forked from the zygote too",
    ),
    Hook(
        _ENGINE + "_set_envs_and_config",
        "after",
        main.after_set_envs,
        "SIGQUIT from a dying child must not kill the server",
    ),
    Hook(
        _TM + "SignalHandler.running_phase_sigquit_handler",
        "replace",
        main.on_sigquit,
        "SIGQUIT from a dying child must not kill the server once it serves",
    ),
    Hook(
        _TM_CLASS + "auto_create_handle_loop",
        "after",
        main.after_auto_create_handle_loop,
        "the coordinator runs on TokenizerManager's event loop",
    ),
    Hook(
        _TM_CLASS + "_tokenize_texts",
        "around",
        main.around_tokenize_texts,
        "a long text would keep main from recoveries, probes and streams for seconds",
    ),
    *(
        Hook(
            f"{_SRT}entrypoints.openai.serving_tokenize.{serving}._handle_non_streaming_request",
            "around",
            long_texts.around_tokenize_request,
            "a long text of /tokenize or /detokenize would keep main from its other work for seconds",
        )
        for serving in ("OpenAIServingTokenize", "OpenAIServingDetokenize")
    ),
    Hook(
        _TM_CLASS + "_dispatch_to_scheduler",
        "around",
        main.around_dispatch,
        "requests are recorded for the replay, and held back during an outage",
    ),
    Hook(
        _TM_CLASS + "_async_dispatch_to_scheduler",
        "around",
        main.around_async_dispatch,
        "control messages are held back during an outage too",
    ),
    Hook(
        _TM_CLASS + "pause_generation",
        "around",
        main.around_pause_generation,
        "a pause that aborts would wait for paused ranks for ever, and hold the lock that continuing needs",
    ),
    Hook(
        _SRT + "managers.communicator.FanOutCommunicator.__call__",
        "around",
        main.around_control_call,
        "control calls end when the server goes down, instead of waiting for dead ranks",
    ),
    Hook(
        _TM_CLASS + "_handle_batch_output",
        "around",
        main.around_handle_batch_output,
        "a batch that would double or skip a token is stopped before it reaches a client",
    ),
    # Admission: requests that could not be resumed after a fault, or would end a rank, get a 400.
    Hook(
        _TM_CLASS + "generate_request",
        "before",
        admission.before_generate_request,
        "requests that cannot be resumed are refused",
    ),
    Hook(
        _TM_CLASS + "_create_tokenized_object",
        "around",
        admission.around_create_tokenized_object,
        "requests that would end a rank, known with their token ids, are refused",
    ),
    Hook(
        _HTTP + "serve_generate_request",
        "around",
        admission.around_serve_generate_request,
        "a stream's status would be sent before a refusal is known",
    ),
    *(
        Hook(
            f"{_SRT}entrypoints.ollama.serving.OllamaServing.{name}",
            "replace",
            function,
            "its streams lose the text of their last message, which is long when main was busy, and say no error",
        )
        for name, function in (
            ("_stream_chat_response", ollama.stream_chat),
            ("_stream_generate_response", ollama.stream_generate),
        )
    ),
    Hook(
        _SRT + "utils.hf_transformers.tokenizer.get_tokenizer",
        "around",
        preload.around_get_tokenizer,
        "main loads the tokenizer once, before the zygote is forked",
    ),
    *(Hook(*row) for row in (*cpu.HOOKS, *groups.HOOKS)),
    Hook(
        _SRT + "models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler",
        "around",
        latent_attention.around_get_handler,
        "torch_native would take the latents of a prompt for its K and V, and fail",
    ),
    Hook(
        _SRT + "layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend",
        "around",
        short_extends.around_run_sdpa_forward_extend,
        "torch_native would compute a kept prefix again, which takes seconds of a recovery",
    ),
    Hook(
        _SRT + "mem_cache.memory_pool.ReqToTokenPool.__init__",
        "around",
        request_rows.around_req_to_token_pool_init,
        "on CPU it would spend a third of a recovery on zeroing unused memory",
    ),
    Hook(
        _SRT + "utils.common.parse_lscpu_topology",
        "around",
        topology.around_parse_lscpu_topology,
        "on CPU a rank's start would run lscpu several times; spares have asked it",
    ),
    *(
        Hook(
            _LORA + name,
            "around",
            unpinned.around_lora,
            "on CPU it asks for pinned memory, which torch has only beside an accelerator",
        )
        for name in ("init_state", "prepare_lora_batch")
    ),
    # GPUs.
    Hook(
        _SRT + "platforms.cuda.CudaDeviceMixin.get_torch_distributed_backend_str",
        "around",
        collectives.around_backend,
        "NCCL refuses several ranks on one GPU",
    ),
    Hook(
        _SCHEDULER + "init_request_dispatcher",
        "after",
        graphs.after_init_request_dispatcher,
        "decode graphs are captured on main's command, after a generation's first tokens",
    ),
)


def install_all(allow_drift: bool | Collection[str] = False) -> None:
    """Compare the table with the installed SGLang, install every hook and verify that it took.

    ``allow_drift``: the symbols that may differ, True for all. Raises
    :class:`anchortp_sglang.hooks.manifest.DriftError` for others, ValueError for a name that is no symbol, and
    :class:`anchortp_sglang.hooks.install.HookError` whatever is allowed.
    """
    # Before patching, so that a missing symbol is reported as drift.
    for drift in manifest.allow(manifest.compare(HOOKS), allow_drift):
        logger.warning(
            "SGLang differs from the version of the hooks; going on, as --anchor-allow-drift is set: %s", drift
        )
    install.install(HOOKS)
    logger.info("%d hooks into SGLang %s installed and verified", len(HOOKS), manifest.installed_version())
