"""Which adapters a model can take: each of those refused would end all ranks in the middle of a step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anchortp_sglang.rank.weights.adapters import check

R, HIDDEN, QKV, OUT = 4, 32, 48, 24
PREFIX = "model.layers.0.self_attn."
SHAPES = {f"{PREFIX}qkv_proj": (QKV, HIDDEN), f"{PREFIX}o_proj": (HIDDEN, OUT)}


def tensors(**changed: object) -> dict[str, torch.Tensor]:
    """An adapter of q, k and v, which SGLang has stacked, and of the output; then what is changed, None: left out."""
    shapes = {
        "qkv_proj.lora_A": (3 * R, HIDDEN),
        "qkv_proj.lora_B": (QKV, R),
        "o_proj.lora_A": (R, OUT),
        "o_proj.lora_B": (HIDDEN, R),
    }
    shapes |= {name.replace("__", "."): shape for name, shape in changed.items()}
    return {f"{PREFIX}{name}.weight": torch.zeros(shape) for name, shape in shapes.items() if shape is not None}


def ask(weights: dict[str, torch.Tensor], rank: object = R, **more: object) -> None:
    manager = SimpleNamespace(
        target_modules={"qkv_proj", "o_proj"}, base_model=None, lora_modules=[dict.fromkeys(SHAPES)]
    )
    config, layers = SimpleNamespace(r=rank), [SimpleNamespace(weights=weights)]
    check(manager, SHAPES, SimpleNamespace(config=config, layers=layers, **more))


def test_one_that_fits_is_taken() -> None:
    ask(tensors())
    ask(tensors(o_proj__lora_A=None, o_proj__lora_B=None))


@pytest.mark.parametrize(
    "changed, text",
    [
        ({"o_proj__lora_A": (R, OUT + 1)}, "of another model or rank"),
        ({"qkv_proj__lora_B": (QKV - 1, R)}, "of another model or rank"),
        ({"qkv_proj__lora_A": (R, HIDDEN)}, "of another model or rank"),
        ({"o_proj__lora_B": (HIDDEN, 2 * R)}, "of another model or rank"),
        ({"o_proj__lora_B": ()}, "of another model or rank"),
        ({"o_proj__lora_B": None}, "lora_A or lora_B alone"),
        ({"k_proj__lora_A": (R, HIDDEN)}, "belongs to none of the adapted modules"),
        ({"input_layernorm": (HIDDEN,)}, "belongs to none of the adapted modules"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ask(tensors(**changed))


@pytest.mark.parametrize("rank", [8.0, 0, -4, True, None, "4"])
def test_ranks_that_are_no_numbers_are_refused(rank: object) -> None:
    with pytest.raises(ValueError, match="no whole number above 0"):
        ask(tensors(), rank)


def test_adapters_of_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="embed_tokens"):
        ask(tensors(), embedding_layers={"embed_tokens.lora_A": torch.zeros(1)})
