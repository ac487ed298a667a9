"""Gemma-4's config.json. Its layers are unlike: those with a sliding window have heads of their own size and number.

In the larger models a layer without a window takes K for V as well; in the smaller ones the last layers read the KV of
earlier ones and have wider MLPs. Written against transformers 5.19 (`Gemma4TextConfig`) and SGLang 0.5.23
(`_apply_gemma4_attention_overrides`, models/gemma4_causal.py).
"""

from collections.abc import Mapping
from typing import Any

WINDOW_HEAD_DIM, WINDOW_KV_HEADS = "swa_head_dim", "swa_num_key_value_heads"
"""SGLang's keys for layers with a sliding window; head_dim and num_key_value_heads are then those of the others."""

SHARED_KV, K_IS_V, OWN_V = "shared_kv", "k_is_v", "own_v"
"""Keys of our own in the config of a layer: where its K and V come from."""

_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "vocab_size": 262144,
    "tie_word_embeddings": True,
}
_OWN_INPUT = {"vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256}
"""Defaults of `Gemma4TextConfig` for inputs of layers, which `Gemma4UnifiedTextConfig` does not have."""
_PERIOD = 6
_OF_HEADS = ("head_dim", "num_key_value_heads")


def flattened(config: Mapping[str, Any], unified: bool) -> dict[str, Any]:
    """Return the config.json of a Gemma-4 language model with SGLang's keys, and with every key that rules read.

    ``unified``: it is a `Gemma4UnifiedTextConfig`. Raises ValueError for one that SGLang could not read either.
    """
    if WINDOW_HEAD_DIM in config:
        return dict(config)
    if config.get("use_bidirectional_attention") == "all":
        raise ValueError("use_bidirectional_attention is all: tokens see later ones; only causal attention is resumed")
    given = {key: value for key, value in config.items() if key != "per_layer_config"}
    found = {**_DEFAULTS, **({} if unified else _OWN_INPUT), **given}
    count = found.get("num_hidden_layers")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"num_hidden_layers must be positive, but is {count!r}")
    kinds = found.get("layer_types") or [
        "full_attention" if layer % _PERIOD == _PERIOD - 1 else "sliding_attention" for layer in range(count)
    ]
    if len(kinds) != count:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers {count}")
    found["layer_types"] = [*kinds[:-1], "full_attention"]
    found["vocab_size_per_layer_input"] = found.get("vocab_size_per_layer_input") or found["vocab_size"]
    _check_sharing(found)
    full = _full_heads(config, found)
    window = {WINDOW_HEAD_DIM: found["head_dim"], WINDOW_KV_HEADS: found["num_key_value_heads"]}
    return found | window | full


def _check_sharing(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless each layer that reads the KV of an earlier one has one of its kind to read."""
    shared, count, kinds = config.get("num_kv_shared_layers") or 0, config["num_hidden_layers"], config["layer_types"]
    if (
        not isinstance(shared, int)
        or not 0 <= shared < count
        or set(kinds[count - shared :]) - set(kinds[: -shared or None])
    ):
        raise ValueError(
            f"num_kv_shared_layers is {shared!r}: those layers have none of their kind before them to read"
        )


def layer_config(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Return a flattened config.json as one layer has it."""
    window = config["layer_types"][layer] == "sliding_attention"
    shared = layer >= config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)
    k_is_v = bool(config.get("attention_k_eq_v")) and not window and not shared
    own = {SHARED_KV: shared, K_IS_V: k_is_v, OWN_V: not shared and not k_is_v}
    if window:
        own |= {"head_dim": config[WINDOW_HEAD_DIM], "num_key_value_heads": config[WINDOW_KV_HEADS]}
    if shared and config.get("use_double_wide_mlp"):
        own["intermediate_size"] = 2 * config["intermediate_size"]
    return {**config, **own}


def _full_heads(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, int]:
    """Return size and number of the KV heads of layers without a window.

    transformers writes them as ``per_layer_config``, the released files under names of their own.
    """
    saved = config.get("per_layer_config")
    if saved is None:
        kv_heads = found.get("num_global_key_value_heads") if found.get("attention_k_eq_v") else None
        return {
            "head_dim": found["global_head_dim"],
            "num_key_value_heads": kv_heads or found["num_key_value_heads"],
        }
    by_layer = {int(layer): own for layer, own in saved.items()}
    full = [layer for layer, kind in enumerate(found["layer_types"]) if kind == "full_attention"]
    shapes = [{key: found[key] for key in _OF_HEADS} | by_layer.get(layer, {}) for layer in full]
    if by_layer.keys() - set(full) or any(shape != shapes[0] or shape.keys() - set(_OF_HEADS) for shape in shapes):
        raise ValueError(
            "per_layer_config: only layers of full attention may differ from others, all alike, in head_dim and "
            "num_key_value_heads"
        )
    return shapes[0]
