"""Model families as data: the parameters SGLang creates, and the checkpoint tensors that fill them.

A new family is a new entry in ``FAMILIES``, written with the rules of ``rules.py``.
"""

from dataclasses import replace

from anchortp_sglang.planning.model.gemma_families import GEMMA2, GEMMA3, GEMMA4, GEMMA4_MOE
from anchortp_sglang.planning.model.rules import (
    BEFORE_ATTENTION,
    BEFORE_MLP,
    EMBED,
    FUSED_MLP,
    HEAD,
    MLP,
    NORM,
    O_PROJ,
    QK_NORM,
    Family,
    Rule,
    experts,
    gated_mlp,
    linear,
    o_bias,
    plain,
    qkv,
    qkv_bias,
    summed,
    vector,
)
from anchortp_sglang.planning.model.wrappers import STACKED_EXPERTS

# models/llama.py, `LlamaDecoderLayer`: the biases follow `attention_bias or bias`; `LlamaMLP` has none.
_LLAMA_BIAS = ("attention_bias", "bias")
_LLAMA = Family(
    before=(EMBED,),
    layer=(BEFORE_ATTENTION, qkv(), qkv_bias(_LLAMA_BIAS), O_PROJ, o_bias(_LLAMA_BIAS), BEFORE_MLP),
    dense=MLP,
    after=(NORM, HEAD),
    refused=(("mlp_bias", "SGLang's LlamaMLP drops the MLP biases, so its answers would be wrong"),),
)

# models/qwen2.py, `Qwen2Attention`: q, k, v always have a bias, o_proj never.
_QWEN2 = Family(
    before=(EMBED,),
    layer=(BEFORE_ATTENTION, qkv(), qkv_bias(), O_PROJ, BEFORE_MLP),
    dense=MLP,
    after=(NORM, HEAD),
    defaults=(("num_key_value_heads", 32),),
)

# models/qwen3.py, `Qwen3Attention`: q_norm and k_norm span one head, so every rank needs them whole.
_BIAS = ("attention_bias",)
_QWEN3 = Family(
    before=(EMBED,),
    layer=(BEFORE_ATTENTION, qkv(), qkv_bias(_BIAS), *QK_NORM, O_PROJ, o_bias(_BIAS), BEFORE_MLP),
    dense=MLP,
    after=(NORM, HEAD),
    defaults=(("num_key_value_heads", 32), ("head_dim", 128)),
)

# models/qwen3_moe.py, `Qwen3MoeSparseMoeBlock`: SGLang gives every layer experts, whatever config.json says.
# In checkpoints of Qwen3-VL all experts of a layer are one tensor, (expert, in, out), gate before up.
_STACKED_EXPERTS = "mlp.experts."
_ROUTER, *_SEPARATE = experts("mlp.", "gate_proj", "up_proj", "down_proj")
_QWEN3_MOE = replace(
    _QWEN3,
    dense=(),
    sparse=(
        _ROUTER,
        *(replace(rule, unless=STACKED_EXPERTS) for rule in _SEPARATE),
        Rule(
            _STACKED_EXPERTS + "w13_weight",
            ((_STACKED_EXPERTS + "gate_up_proj", "expert_column"),) * 2,
            dim=1,
            rest=("experts", "hidden"),
            only_if=(STACKED_EXPERTS,),
            transposed=True,
        ),
        Rule(
            _STACKED_EXPERTS + "w2_weight",
            ((_STACKED_EXPERTS + "down_proj", "expert_column"),),
            dim=2,
            rest=("experts", "hidden"),
            only_if=(STACKED_EXPERTS,),
            transposed=True,
        ),
    ),
    columns=(("expert_column", "moe_intermediate_size"),),
    experts="num_local_experts",
    aliases=(("num_experts", "num_local_experts"),),
    defaults=(("num_key_value_heads", 4), ("num_local_experts", 128)),
)

# models/mixtral.py: no biases.
_MIXTRAL = Family(
    before=(EMBED,),
    layer=(BEFORE_ATTENTION, qkv(), O_PROJ, BEFORE_MLP),
    dense=(),
    sparse=experts("block_sparse_moe.", "w1", "w3", "w2"),
    after=(NORM, HEAD),
    columns=(("expert_column", "intermediate_size"),),
    experts="num_local_experts",
    aliases=(("num_experts", "num_local_experts"),),
    defaults=(("num_local_experts", 8), ("num_key_value_heads", 8)),
)

# models/llama.py, `Phi3ForCausalLM`: the checkpoint holds q, k and v in one tensor, gate and up in another. (SGLang
# applies neither its sliding window nor Mistral's.)
_PHI3 = replace(
    _LLAMA,
    layer=(
        BEFORE_ATTENTION,
        Rule(
            "self_attn.qkv_proj.weight",
            tuple(("self_attn.qkv_proj.weight", axis) for axis in ("q_head", "kv_head", "kv_head")),
            projection=True,
        ),
        O_PROJ,
        BEFORE_MLP,
    ),
    dense=FUSED_MLP,
)

# models/glm4.py: two more norms, on what attention and MLP put out; q, k, v with a bias.
_GLM4 = replace(
    _QWEN2,
    layer=(
        BEFORE_ATTENTION,
        qkv(),
        qkv_bias(_BIAS),
        O_PROJ,
        vector("post_self_attn_layernorm.weight", "hidden"),
        BEFORE_MLP,
    ),
    dense=(*FUSED_MLP, vector("post_mlp_layernorm.weight", "hidden")),
)

# models/olmo2.py, `Olmo2Attention`: no norm before attention and MLP but behind them; q_norm and k_norm span all heads,
# so a rank has the part of its heads, and the mean is summed over the ranks (rank/weights/head_norms.py).
_OLMO2 = Family(
    before=(EMBED,),
    layer=(
        qkv(),
        qkv_bias(_BIAS),
        vector("self_attn.q_norm.weight", "q_head"),
        vector("self_attn.k_norm.weight", "kv_head"),
        O_PROJ,
        o_bias(_BIAS),
        BEFORE_MLP,
    ),
    dense=(*MLP, vector("post_feedforward_layernorm.weight", "hidden")),
    after=(NORM, HEAD),
)

# models/gpt_oss.py: all experts of a layer in one tensor, (expert, in, out), gate and up taking turns in its columns;
# SGLang has them the other way round (but not with the MoE runner triton_kernel). `_load_normal_weights` gives the bias
# of down to the first rank alone.
_GPT_OSS = Family(
    before=(EMBED,),
    layer=(
        BEFORE_ATTENTION,
        qkv(),
        qkv_bias(_BIAS),
        replace(vector("self_attn.sinks", "head"), dtype="bfloat16"),
        O_PROJ,
        o_bias(_BIAS),
        BEFORE_MLP,
    ),
    dense=(),
    sparse=(
        plain("mlp.router.weight", "experts"),
        vector("mlp.router.bias", "experts"),
        Rule(
            _STACKED_EXPERTS + "w13_weight",
            ((_STACKED_EXPERTS + "gate_up_proj", "expert_column_pair"),),
            dim=1,
            rest=("experts", "hidden"),
            transposed=True,
        ),
        Rule(
            _STACKED_EXPERTS + "w13_weight_bias",
            ((_STACKED_EXPERTS + "gate_up_proj_bias", "expert_column_pair"),),
            dim=1,
            rest=("experts",),
            dtype="float32",
        ),
        Rule(
            _STACKED_EXPERTS + "w2_weight",
            ((_STACKED_EXPERTS + "down_proj", "expert_column"),),
            dim=2,
            rest=("experts", "hidden"),
            transposed=True,
        ),
        Rule(
            _STACKED_EXPERTS + "w2_weight_bias",
            ((_STACKED_EXPERTS + "down_proj_bias", "hidden"),),
            dim=1,
            rest=("experts",),
            first_rank_only=True,
            dtype="float32",
        ),
    ),
    after=(NORM, replace(HEAD, unless=None)),
    columns=(("expert_column", "intermediate_size"),),
    experts="num_local_experts",
    aliases=(("num_experts", "num_local_experts"),),
    layer_types=("full_attention", "sliding_attention"),
    defaults=(("num_key_value_heads", 8), ("head_dim", 64), ("attention_bias", True)),
    layout_only="SGLang serves it with attention kernels that know sinks, and has none on a CPU without AMX",
)

# models/deepseek_v2.py: latent attention. Heads are split, the projections down to the latents are not; kv_b_proj is
# taken apart into w_kc and w_vc after loading. With q_lora_rank the two projections down are one parameter.
_DEEPSEEK_V2 = Family(
    before=(EMBED,),
    layer=(
        BEFORE_ATTENTION,
        Rule(
            "self_attn.fused_qkv_a_proj_with_mqa.weight",
            (("self_attn.q_a_proj.weight", "q_lora"), ("self_attn.kv_a_proj_with_mqa.weight", "latent")),
            projection=True,
            only_if=("q_lora_rank",),
        ),
        vector("self_attn.q_a_layernorm.weight", "q_lora", ("q_lora_rank",)),
        linear("self_attn.q_b_proj.weight", "q_head", "q_lora", ("q_lora_rank",)),
        replace(linear("self_attn.q_proj.weight", "q_head"), unless="q_lora_rank"),
        replace(linear("self_attn.kv_a_proj_with_mqa.weight", "latent"), unless="q_lora_rank"),
        linear("self_attn.kv_b_proj.weight", "kv_b_head", "kv_lora"),
        summed("self_attn.o_proj.weight", "v_head"),
        vector("self_attn.kv_a_layernorm.weight", "kv_lora"),
        BEFORE_MLP,
    ),
    dense=MLP,
    sparse=(
        *experts("mlp.", "gate_proj", "up_proj", "down_proj"),
        *(replace(rule, only_if=("n_shared_experts",)) for rule in gated_mlp("mlp.shared_experts.", "shared_expert")),
    ),
    after=(NORM, HEAD),
    columns=(
        ("mlp", "intermediate_size"),
        ("shared_expert", "moe_intermediate_size", "n_shared_experts"),
        ("expert_column", "moe_intermediate_size"),
    ),
    experts="n_routed_experts",
    aliases=(("num_experts", "n_routed_experts"),),
    latent_kv=True,
    refused=(("attention_bias", "SGLang's DeepSeek attention has no biases"),),
)

# The router of topk_method noaux_tc adds a bias to the scores by which experts are chosen; SGLang keeps it in float32.
_CORRECTION = replace(vector("mlp.gate.e_score_correction_bias", "experts"), dtype="float32")
_DEEPSEEK_V3 = replace(
    _DEEPSEEK_V2,
    sparse=(_DEEPSEEK_V2.sparse[0], _CORRECTION, *_DEEPSEEK_V2.sparse[1:]),
    aliases=(("num_local_experts", "n_routed_experts"), ("num_mtp_layers", "num_nextn_predict_layers")),
)

FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": _DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": _DEEPSEEK_V3,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma4TextForCausalLM": GEMMA4,
    "Gemma4TextMoeForCausalLM": GEMMA4_MOE,
    "Glm4ForCausalLM": _GLM4,
    "GptOssForCausalLM": _GPT_OSS,
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "Olmo2ForCausalLM": _OLMO2,
    "Phi3ForCausalLM": _PHI3,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
}
"""HF architecture name -> its family."""
