"""Multimodal models that `tiny_checkpoint` writes: a family's language model, a small vision tower, a processor.

Names, shapes and config keys are those of the released models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from anchortp_sglang.testing.tiny_families import Family
from anchortp_sglang.testing.tiny_layers import Part, Sizes, Tensors
from anchortp_sglang.testing.tiny_towers import (
    BLOCKS,
    HEADS,
    INNER,
    WIDTH,
    gemma4_tower,
    pixtral,
    qwen3_tower,
    qwen25_tower,
    siglip,
)

Wrapped = Literal["gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]

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


def _tower(**more: Any) -> dict[str, Any]:
    return {"hidden_size": WIDTH, "intermediate_size": INNER, **more}


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
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    ids = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 4}
    return _around("gemma3", "gemma3_text", sizes, text, vision_config=tower, **ids)


def _gemma4(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
    tower = _tower(
        model_type="gemma4_vision",
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        patch_size=14,
        position_embedding_size=16,
    )
    # transformers reads no text from these ids, so that they must be some that random weights do not answer with.
    ids = dict.fromkeys(("image_token_id", "audio_token_id", "video_token_id"), text["pad_token_id"])
    return _around("gemma4", "gemma4_text", sizes, text, vision_config=tower, audio_config=None, **ids)


def _mistral3(sizes: Sizes, text: dict[str, Any]) -> dict[str, Any]:
    tower = _tower(
        model_type="pixtral",
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        head_dim=WIDTH // HEADS,
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
        depth=BLOCKS,
        num_heads=HEADS,
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
            depth=BLOCKS,
            num_heads=HEADS,
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
        siglip,
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
        gemma4_tower,
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
        pixtral,
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
        qwen25_tower,
        _qwen2_5_vl,
        _qwen_files("Qwen2_5_VLProcessor", 14),
    ),
    "qwen3_vl": TinyWrapper(
        "Qwen3VLForConditionalGeneration",
        "qwen3",
        _in_model,
        qwen3_tower,
        _qwen3_vl("qwen3_vl"),
        _qwen_files("Qwen3VLProcessor", 16),
    ),
    "qwen3_vl_moe": TinyWrapper(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_moe",
        _in_model,
        qwen3_tower,
        _qwen3_vl("qwen3_vl_moe"),
        _qwen_files("Qwen3VLProcessor", 16),
        parts=((3, _stacked_experts),),
    ),
}
"""Multimodal models by the `model_type` of their config.json."""
