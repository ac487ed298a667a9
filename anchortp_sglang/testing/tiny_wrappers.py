"""Multimodal models that `tiny_checkpoint` writes: a family's language model, a small vision tower, a processor.

Names, shapes and config keys are those of the released models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from anchortp_sglang.testing.tiny_families import Family
from anchortp_sglang.testing.tiny_layers import Part, Sizes, Tensors

Wrapped = Literal["gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]

_WIDTH, _INNER, _BLOCKS, _HEADS = 32, 64, 2, 4
"""Widths, depth and heads of every vision tower."""

_IMAGE_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
"""Ids of bytes that no test prompt takes for an image's: random weights know none."""


@dataclass(frozen=True)
class TinyWrapper:
    """A multimodal model around the language model of a family.

    ``name``: of a language model's tensor in this checkpoint. ``vision``: names and shapes of all other tensors.
    ``config``: config.json but for its ``architectures``, from the sizes and the language model's. ``files``: the
    processor's.
    """

    architecture: str
    of: Family
    name: Callable[[str], str]
    vision: Callable[[Sizes], Tensors]
    config: Callable[[Sizes, dict[str, Any]], dict[str, Any]]
    files: Mapping[str, Mapping[str, Any]]
    parts: tuple[tuple[int, Part], ...] = ()
    """Pairs of a part's place in the family's layer, and what is there instead."""


def _biased(name: str, rows: int, *inner: int) -> Tensors:
    yield f"{name}.weight", (rows, *inner)
    yield f"{name}.bias", (rows,)


def _siglip(sizes: Sizes) -> Tensors:
    tower = "vision_tower.vision_model"
    yield from _biased(f"{tower}.embeddings.patch_embedding", _WIDTH, 3, 14, 14)
    yield f"{tower}.embeddings.position_embedding.weight", (16, _WIDTH)
    for block in range(_BLOCKS):
        name = f"{tower}.encoder.layers.{block}"
        yield from _biased(f"{name}.layer_norm1", _WIDTH)
        yield from _biased(f"{name}.layer_norm2", _WIDTH)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _biased(f"{name}.self_attn.{projection}", _WIDTH, _WIDTH)
        yield from _biased(f"{name}.mlp.fc1", _INNER, _WIDTH)
        yield from _biased(f"{name}.mlp.fc2", _WIDTH, _INNER)
    yield from _biased(f"{tower}.post_layernorm", _WIDTH)
    yield "multi_modal_projector.mm_input_projection_weight", (_WIDTH, sizes.hidden_size)
    yield "multi_modal_projector.mm_soft_emb_norm.weight", (_WIDTH,)


def _gemma4_tower(sizes: Sizes) -> Tensors:
    tower = "model.vision_tower"
    yield f"{tower}.patch_embedder.position_embedding_table", (2, 16, _WIDTH)
    yield f"{tower}.patch_embedder.input_proj.weight", (_WIDTH, 3 * 14 * 14)
    for block in range(_BLOCKS):
        name = f"{tower}.encoder.layers.{block}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.self_attn.{projection}.linear.weight", (_WIDTH, _WIDTH)
        for one in ("q_norm", "k_norm"):
            yield f"{name}.self_attn.{one}.weight", (_WIDTH // _HEADS,)
        for projection in ("gate_proj", "up_proj"):
            yield f"{name}.mlp.{projection}.linear.weight", (_INNER, _WIDTH)
        yield f"{name}.mlp.down_proj.linear.weight", (_WIDTH, _INNER)
        for one in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{name}.{one}_layernorm.weight", (_WIDTH,)
    yield "model.embed_vision.embedding_projection.weight", (sizes.hidden_size, _WIDTH)


def _pixtral(sizes: Sizes) -> Tensors:
    yield "vision_tower.patch_conv.weight", (_WIDTH, 3, 14, 14)
    yield "vision_tower.ln_pre.weight", (_WIDTH,)
    for block in range(_BLOCKS):
        name = f"vision_tower.transformer.layers.{block}"
        yield f"{name}.attention_norm.weight", (_WIDTH,)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.attention.{projection}.weight", (_WIDTH, _WIDTH)
        yield f"{name}.ffn_norm.weight", (_WIDTH,)
        for projection in ("gate_proj", "up_proj"):
            yield f"{name}.feed_forward.{projection}.weight", (_INNER, _WIDTH)
        yield f"{name}.feed_forward.down_proj.weight", (_WIDTH, _INNER)
    yield "multi_modal_projector.norm.weight", (_WIDTH,)
    yield "multi_modal_projector.patch_merger.merging_layer.weight", (_WIDTH, 4 * _WIDTH)
    yield "multi_modal_projector.linear_1.weight", (sizes.hidden_size, _WIDTH)
    yield "multi_modal_projector.linear_2.weight", (sizes.hidden_size, sizes.hidden_size)


def _qwen25_tower(sizes: Sizes) -> Tensors:
    yield "visual.patch_embed.proj.weight", (_WIDTH, 3, 2, 14, 14)
    for block in range(_BLOCKS):
        name = f"visual.blocks.{block}"
        yield f"{name}.norm1.weight", (_WIDTH,)
        yield f"{name}.norm2.weight", (_WIDTH,)
        yield from _biased(f"{name}.attn.qkv", 3 * _WIDTH, _WIDTH)
        yield from _biased(f"{name}.attn.proj", _WIDTH, _WIDTH)
        yield from _biased(f"{name}.mlp.gate_proj", _INNER, _WIDTH)
        yield from _biased(f"{name}.mlp.up_proj", _INNER, _WIDTH)
        yield from _biased(f"{name}.mlp.down_proj", _WIDTH, _INNER)
    yield "visual.merger.ln_q.weight", (_WIDTH,)
    yield from _biased("visual.merger.mlp.0", 4 * _WIDTH, 4 * _WIDTH)
    yield from _biased("visual.merger.mlp.2", sizes.hidden_size, 4 * _WIDTH)


def _qwen3_tower(sizes: Sizes) -> Tensors:
    def merger(name: str, norm: int) -> Tensors:
        yield from _biased(f"{name}.norm", norm)
        yield from _biased(f"{name}.linear_fc1", 4 * _WIDTH, 4 * _WIDTH)
        yield from _biased(f"{name}.linear_fc2", sizes.hidden_size, 4 * _WIDTH)

    yield from _biased("model.visual.patch_embed.proj", _WIDTH, 3, 2, 16, 16)
    yield "model.visual.pos_embed.weight", (64, _WIDTH)
    for block in range(_BLOCKS):
        name = f"model.visual.blocks.{block}"
        yield from _biased(f"{name}.norm1", _WIDTH)
        yield from _biased(f"{name}.norm2", _WIDTH)
        yield from _biased(f"{name}.attn.qkv", 3 * _WIDTH, _WIDTH)
        yield from _biased(f"{name}.attn.proj", _WIDTH, _WIDTH)
        yield from _biased(f"{name}.mlp.linear_fc1", _INNER, _WIDTH)
        yield from _biased(f"{name}.mlp.linear_fc2", _WIDTH, _INNER)
    yield from merger("model.visual.merger", _WIDTH)
    yield from merger("model.visual.deepstack_merger_list.0", 4 * _WIDTH)


def _tower(**more: Any) -> dict[str, Any]:
    return {"hidden_size": _WIDTH, "intermediate_size": _INNER, **more}


def _around(model_type: str, text_type: str, sizes: Sizes, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a config.json with the language model's in ``text_config``."""
    own = {key: text[key] for key in ("torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id")}
    inner = {key: value for key, value in text.items() if key not in ("architectures", *own)}
    tied = {"tie_word_embeddings": sizes.tie_word_embeddings}
    return {
        "model_type": model_type,
        "text_config": inner | {"model_type": text_type},
        **own,
        **tied,
        **more,
    }


def _gemma3(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
    tower = _tower(
        model_type="siglip_vision_model",
        num_hidden_layers=_BLOCKS,
        num_attention_heads=_HEADS,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    ids = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 4}
    return _around("gemma3", "gemma3_text", sizes, text, vision_config=tower, **ids)


def _gemma4(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
    tower = _tower(
        model_type="gemma4_vision",
        num_hidden_layers=_BLOCKS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=_WIDTH // _HEADS,
        patch_size=14,
        position_embedding_size=16,
    )
    # transformers reads no text from these ids, so that they must be some that random weights do not answer with.
    ids = dict.fromkeys(("image_token_id", "audio_token_id", "video_token_id"), text["pad_token_id"])
    return _around("gemma4", "gemma4_text", sizes, text, vision_config=tower, audio_config=None, **ids)


def _mistral3(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
    tower = _tower(
        model_type="pixtral",
        num_hidden_layers=_BLOCKS,
        num_attention_heads=_HEADS,
        head_dim=_WIDTH // _HEADS,
        image_size=56,
        patch_size=14,
        rope_theta=10000.0,
        hidden_act="silu",
    )
    more = {
        "image_token_index": 3,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    }
    return _around("mistral3", "mistral", sizes, text, vision_config=tower, **more)


def _sections(sizes: Sizes, *shares: int) -> list[int]:
    """Share half of a head's columns out to time, height and width."""
    half, whole = sizes.head_columns // 2, sum(shares)
    height, width = (half * share // whole for share in shares[1:])
    return [half - height - width, height, width]


def _qwen2_5_vl(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json as Qwen released it, without a text_config."""
    tower = _tower(
        model_type="qwen2_5_vl",
        depth=_BLOCKS,
        num_heads=_HEADS,
        out_hidden_size=sizes.hidden_size,
        hidden_act="silu",
        in_chans=3,
        patch_size=14,
        spatial_merge_size=2,
        spatial_patch_size=14,
        temporal_patch_size=2,
        tokens_per_second=2,
        window_size=112,
        fullatt_block_indexes=[1],
    )
    rope = {"type": "mrope", "mrope_section": _sections(sizes, 2, 3, 3)}
    return text | {"model_type": "qwen2_5_vl", "rope_scaling": rope, "vision_config": tower, **_IMAGE_TOKENS}


def _qwen3_vl(model_type: str) -> Callable[[Sizes, dict[str, Any]], dict[str, Any]]:
    def config(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
        tower = _tower(
            model_type=model_type,
            depth=_BLOCKS,
            num_heads=_HEADS,
            out_hidden_size=sizes.hidden_size,
            hidden_act="gelu_pytorch_tanh",
            in_channels=3,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        )
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": _sections(sizes, 24, 20, 20)}
        text = text | {"rope_scaling": rope}
        more = {"vision_config": tower, **_IMAGE_TOKENS}
        return _around(model_type, f"{model_type}_text", sizes, text, **more)

    return config


def _stacked_experts(sizes: Sizes, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return Qwen3-VL's experts: rows are inputs, and gate stands before up."""
    count, hidden, inner = sizes.num_experts, sizes.hidden_size, sizes.moe_intermediate_size
    yield "mlp.gate.weight", (count, hidden)
    yield "mlp.experts.gate_up_proj", (count, hidden, 2 * inner)
    yield "mlp.experts.down_proj", (count, inner, hidden)


def _in_language_model(name: str) -> str:
    return f"language_model.{name}"


def _in_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _qwen_files(image: str, patch: int) -> dict[str, dict[str, Any]]:
    pixels = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12544}
    size = {"shortest_edge": 3136, "longest_edge": 12544}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = {"processor_class": image, "size": size, **pixels, **mean}
    return {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **processor},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor" if "2_5" in image else "Qwen3VLVideoProcessor",
            **processor,
        },
    }


WRAPPED: dict[Wrapped, TinyWrapper] = {
    "gemma3": TinyWrapper(
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
        _in_language_model,
        _siglip,
        _gemma3,
        {
            "preprocessor_config.json": {
                "image_processor_type": "Gemma3ImageProcessor",
                "processor_class": "Gemma3Processor",
                "image_seq_length": 4,
                "size": {"height": 56, "width": 56},
            },
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        },
    ),
    "gemma4": TinyWrapper(
        "Gemma4ForConditionalGeneration",
        "gemma4_text",
        _in_model,
        _gemma4_tower,
        _gemma4,
        {
            "preprocessor_config.json": {
                "image_processor_type": "Gemma4ImageProcessor",
                "processor_class": "Gemma4Processor",
                "patch_size": 14,
            },
        },
    ),
    "mistral3": TinyWrapper(
        "Mistral3ForConditionalGeneration",
        "mistral",
        _in_language_model,
        _pixtral,
        _mistral3,
        {
            "preprocessor_config.json": {
                "image_processor_type": "PixtralImageProcessor",
                "processor_class": "PixtralProcessor",
                "patch_size": 14,
                "size": {"longest_edge": 56},
            },
            "processor_config.json": {
                "processor_class": "PixtralProcessor",
                "patch_size": 14,
                "spatial_merge_size": 2,
                "image_token": "#",
                "image_break_token": "$",
                "image_end_token": "%",
            },
        },
    ),
    "qwen2_5_vl": TinyWrapper(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2",
        lambda name: name,
        _qwen25_tower,
        _qwen2_5_vl,
        _qwen_files("Qwen2_5_VLProcessor", 14),
    ),
    "qwen3_vl": TinyWrapper(
        "Qwen3VLForConditionalGeneration",
        "qwen3",
        _in_model,
        _qwen3_tower,
        _qwen3_vl("qwen3_vl"),
        _qwen_files("Qwen3VLProcessor", 16),
    ),
    "qwen3_vl_moe": TinyWrapper(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_moe",
        _in_model,
        _qwen3_tower,
        _qwen3_vl("qwen3_vl_moe"),
        _qwen_files("Qwen3VLProcessor", 16),
        parts=((3, _stacked_experts),),
    ),
}
"""Multimodal models by the `model_type` of their config.json."""
