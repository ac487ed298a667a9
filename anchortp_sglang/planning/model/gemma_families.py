"""The families of Gemma-2, 3 and 4, see ``families.py``."""

from dataclasses import replace

from anchortp_sglang.planning.model.gemma4 import K_IS_V, OWN_V, SHARED_KV, layer_config
from anchortp_sglang.planning.model.rules import (
    BEFORE_ATTENTION,
    BEFORE_MLP,
    EMBED,
    MLP,
    NORM,
    O_PROJ,
    QK_NORM,
    Family,
    Rule,
    linear,
    o_bias,
    plain,
    qkv,
    qkv_bias,
    vector,
)

_BIAS = ("attention_bias",)

# models/gemma2.py: four norms; the head is always the embedding. SGLang keeps the KV of its sliding-window layers like
# that of the others (`disable_hybrid_swa_memory`, arg_groups/model_overrides/gemma2_gemma3.py) and masks older tokens.
GEMMA2 = Family(
    before=(EMBED,),
    layer=(BEFORE_ATTENTION, qkv(), qkv_bias(_BIAS), O_PROJ, o_bias(_BIAS), BEFORE_MLP),
    dense=(
        vector("pre_feedforward_layernorm.weight", "hidden"),
        *MLP,
        vector("post_feedforward_layernorm.weight", "hidden"),
    ),
    after=(NORM,),
    layer_types=("full_attention", "sliding_attention"),
    defaults=(
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("tie_word_embeddings", True),
    ),
    caveats=(
        (
            "attn_logit_softcapping",
            "SGLang's attention on a CPU (torch_native) leaves attn_logit_softcapping out: answers are those of stock "
            "SGLang on a CPU, not quite the released model's",
        ),
    ),
)

# models/gemma3_causal.py: the same with norms of q and k, each over one head, and with all embeddings on every rank.
GEMMA3 = replace(
    GEMMA2,
    defaults=(*GEMMA2.defaults, ("vocab_size", 262208)),
    before=(plain("model.embed_tokens.weight", "vocab_row"),),
    layer=(BEFORE_ATTENTION, qkv(), qkv_bias(_BIAS), *QK_NORM, O_PROJ, o_bias(_BIAS), BEFORE_MLP),
    refused=(("use_bidirectional_attention", "its tokens see later ones; only causal attention is resumed"),),
    caveats=(),
)

# models/gemma4_causal.py. A layer that reads the KV of another has rows for K and V as well, and norms, which nothing
# reads. With `hidden_size_per_layer_input` each layer has an embedding of the tokens of its own.
_OWN_INPUT = ("hidden_size_per_layer_input",)
_QKV_WEIGHT = "self_attn.qkv_proj.weight"
_Q = ("self_attn.q_proj.weight", "q_head")
_GEMMA4_ATTENTION = (
    BEFORE_ATTENTION,
    replace(qkv(), only_if=(OWN_V,)),
    Rule(_QKV_WEIGHT, (_Q, *(("self_attn.k_proj.weight", "kv_head"),) * 2), only_if=(K_IS_V,), repeats=True),
    Rule(_QKV_WEIGHT, (_Q, ("", "kv_head"), ("", "kv_head")), only_if=(SHARED_KV,)),
    QK_NORM[0],
    replace(QK_NORM[1], unless=SHARED_KV),
    Rule("self_attn.k_norm.weight", (("", "head_dim"),), rest=(), only_if=(SHARED_KV,)),
    O_PROJ,
    BEFORE_MLP,
    vector("pre_feedforward_layernorm.weight", "hidden"),
    *MLP,
    vector("post_feedforward_layernorm.weight", "hidden"),
)
_GEMMA4_END = (
    linear("per_layer_input_gate.weight", "own_input", only_if=_OWN_INPUT),
    linear("per_layer_projection.weight", "hidden", "own_input", only_if=_OWN_INPUT),
    vector("post_per_layer_input_norm.weight", "hidden", _OWN_INPUT),
    vector("layer_scalar", "one"),
)
GEMMA4 = Family(
    before=(
        plain("model.embed_tokens.weight", "vocab_row"),
        Rule(
            "model.embed_tokens_per_layer.weight",
            (("model.embed_tokens_per_layer.weight", "own_vocab"),),
            rest=("own_inputs",),
            only_if=_OWN_INPUT,
        ),
        linear("model.per_layer_model_projection.weight", "own_inputs", only_if=_OWN_INPUT),
        vector("model.per_layer_projection_norm.weight", "own_input", _OWN_INPUT),
    ),
    layer=_GEMMA4_ATTENTION,
    dense=_GEMMA4_END,
    after=(NORM,),
    layer_types=("full_attention", "sliding_attention"),
    refused=(("attention_bias", "SGLang's Gemma-4 is untested with biases in attention"),),
    without_stock="stock SGLang refuses Gemma-4 with the one attention backend of CPUs without AMX, torch_native",
    of_layer=layer_config,
    extents=(
        ("own_vocab", "vocab_size_per_layer_input"),
        ("own_input", "hidden_size_per_layer_input"),
        ("own_inputs", "num_hidden_layers", "hidden_size_per_layer_input"),
    ),
    unused=(r"^model\.(audio_tower|embed_vision|embed_audio|vision_embedder|multimodal_embedder)\.",),
)
GEMMA4_MOE = replace(
    GEMMA4,
    dense=(),
    sparse=(
        vector("router.scale", "hidden"),
        plain("router.proj.weight", "experts"),
        Rule("moe.per_expert_scale", (("router.per_expert_scale", "experts"),), rest=()),
        Rule(
            "moe.experts.w13_weight",
            (("experts.gate_up_proj", "expert_column"),) * 2,
            dim=1,
            rest=("experts", "hidden"),
        ),
        Rule("moe.experts.w2_weight", (("experts.down_proj", "expert_column"),), dim=2, rest=("experts", "hidden")),
        *(
            vector(f"{place}_feedforward_layernorm_{n}.weight", "hidden")
            for place, n in (("post", 1), ("post", 2), ("pre", 2))
        ),
        *_GEMMA4_END,
    ),
    columns=(("mlp", "intermediate_size"), ("expert_column", "moe_intermediate_size")),
    experts="num_experts",
)
