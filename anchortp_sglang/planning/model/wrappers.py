"""Multimodal models that wrap a language model: the config.json and the tensor names of the language model alone.

Only text is served of such a model, so its language model is served as a model of its own: as one that SGLang has, or
(Gemma-4) as one of ``anchortp_sglang.models``. Written against the released checkpoints and SGLang 0.5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from anchortp_sglang.planning.model.gemma4 import flattened
from anchortp_sglang.planning.model.sizes import UnsupportedModel

__all__ = [
    "STACKED_EXPERTS",
    "WRAPPERS",
    "Wrapper",
    "language_model",
    "language_tensor",
    "changes_are_shown",
    "shown_config",
]

STACKED_EXPERTS = "stacked_experts"
"""Key of our own in a config: the checkpoint has all experts of a layer in one tensor, gate beside up."""


@dataclass(frozen=True)
class Wrapper:
    """The language model of a multimodal architecture, by the names of its own ``architecture`` and ``model_type``.

    ``inside``: SGLang reads its sizes only from the ``text_config`` of a multimodal config.json, also for a checkpoint
    of the language model alone.
    """

    architecture: str
    model_type: str
    stacked_experts: bool = False
    inside: bool = False


_GEMMA4 = Wrapper("Gemma4TextForCausalLM", "gemma4_text", inside=True)
_GEMMA4_WITH_EXPERTS = "Gemma4TextMoeForCausalLM"

WRAPPERS: dict[str, Wrapper] = {
    "Gemma3ForConditionalGeneration": Wrapper("Gemma3ForCausalLM", "gemma3_text"),
    "Gemma4ForCausalLM": _GEMMA4,
    "Gemma4ForConditionalGeneration": _GEMMA4,
    "Gemma4TextForCausalLM": _GEMMA4,
    _GEMMA4_WITH_EXPERTS: _GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": _GEMMA4,
    "Mistral3ForConditionalGeneration": Wrapper("MistralForCausalLM", "mistral"),
    "Qwen2_5_VLForConditionalGeneration": Wrapper("Qwen2ForCausalLM", "qwen2"),
    "Qwen3VLForConditionalGeneration": Wrapper("Qwen3ForCausalLM", "qwen3"),
    "Qwen3VLMoeForConditionalGeneration": Wrapper("Qwen3MoeForCausalLM", "qwen3_moe", stacked_experts=True),
}
"""HF architecture name -> its language model."""

# The wrapper's own values count in SGLang (`get_hf_eos_token_id`); others only where its text_config has none.
_OF_WRAPPER = ("eos_token_id", "bos_token_id", "pad_token_id")
_INHERITED = ("torch_dtype", "dtype", "tie_word_embeddings", "quantization_config", "compression_config")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
# Old config.json of Qwen-VL have the language model's keys at the top, among those of images.
_OF_IMAGES = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_SHOWN_BESIDE = ("transformers_version", *_OF_WRAPPER, *_INHERITED)

_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),  # as transformers writes it since 4.52
)


def language_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the language model that a multimodal one wraps; of any other model its own.

    Raises UnsupportedModel if its text_config is no object, or its positions are not those of text in a plain model.
    """
    name, wrapper = _named(config)
    if wrapper is None:
        return dict(config)
    text = config.get("text_config")
    if text is None:
        text = {key: value for key, value in config.items() if key not in _OF_IMAGES}
    if not isinstance(text, Mapping):
        raise UnsupportedModel(f"this {name} has a text_config in its config.json that is no object; copy it again")
    found = {key: config[key] for key in _INHERITED if key in config} | dict(text)
    found |= {key: config[key] for key in _OF_WRAPPER if config.get(key) is not None}
    found |= {key: _rope_of_text(name, text[key]) for key in _ROPE_KEYS if text.get(key)}
    found |= {"architectures": [wrapper.architecture], "model_type": wrapper.model_type}
    if wrapper.inside:
        found = _gemma4(name, found, "unified" in f"{name} {config.get('model_type')}".lower())
    return found | ({STACKED_EXPERTS: True} if wrapper.stacked_experts else {})


def _named(config: Mapping[str, Any]) -> tuple[str, Wrapper | None]:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(name), WRAPPERS.get(name) if isinstance(name, str) else None


def shown_config(config: Mapping[str, Any], changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return the config.json with which SGLang serves a model's language model; of most models that of its own.

    ``changes``: keys of the language model that the operator has set. They are in what is returned only if SGLang could
    not apply them itself (``changes_are_shown``). Raises like ``language_model``.
    """
    stored = config.get("text_config") or config
    if not changes_are_shown(config) or not isinstance(stored, Mapping):
        return language_model(config)
    text = {key: value for key, value in stored.items() if key != "architectures"}
    changed = {**config, **changes, "text_config": _merged(text, changes)}
    kind = config.get("model_type")
    return {
        **{key: changed[key] for key in _SHOWN_BESIDE if key in changed},
        "architectures": language_model(changed)["architectures"],
        "model_type": "gemma4" if kind in (None, _GEMMA4.model_type) else kind,
        "language_model_only": True,
        "text_config": changed["text_config"],
    }


def changes_are_shown(config: Mapping[str, Any]) -> bool:
    """Return whether an operator's changes must be in what SGLang is shown: it would make them at the top alone."""
    wrapper = _named(config)[1]
    return wrapper is not None and wrapper.inside


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change keys; an object is merged with what is there, as SGLang merges those of rotary positions."""
    return {
        **old,
        **{
            key: _merged(old[key], value) if isinstance(value, Mapping) and isinstance(old.get(key), Mapping) else value
            for key, value in changes.items()
        },
    }


def language_tensor(name: str) -> str:
    """Return the name that a checkpoint tensor has in a checkpoint of the language model alone."""
    for prefix, own in _PREFIXES:
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def _gemma4(name: str, config: Mapping[str, Any], unified: bool) -> dict[str, Any]:
    try:
        flat = flattened(config, unified)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModel(f"this {name} cannot be served: {error}") from error
    return flat | ({"architectures": [_GEMMA4_WITH_EXPERTS]} if config.get("enable_moe_block") else {})


def _rope_of_text(architecture: str, rope: Any) -> Any:
    """Drop what positions of images need: a token of text has three equal ones, by which rotations are the plain ones.

    SGLang: ``MRotaryEmbedding`` (layers/rotary_embedding).
    """
    if not isinstance(rope, Mapping) or "mrope_section" not in rope:
        return rope
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise UnsupportedModel(f"this {architecture} scales its positions by {kind}: untested without images")
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    plain.pop("type", None)
    return plain | {"rope_type": "default"} if plain.keys() - {"rope_type"} else None
