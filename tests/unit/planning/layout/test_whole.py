"""A tensor that is cut by ``runs_of_whole`` is cut like the parameter itself."""

import numpy as np
import pytest

from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.layout.whole import runs_of_whole, whole_shape
from anchortp_sglang.planning.model.axes import ModelAxes, read_model_axes
from anchortp_sglang.planning.ownership.ownership import split

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 80, "head_dim": 4}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4}


def axes(architecture: str) -> ModelAxes:
    return read_model_axes({"architectures": [architecture], "torch_dtype": "float32", **SIZES})


def cut(architecture: str, param: str, rank: int) -> np.ndarray:
    """What the second of devices with 1, 2 and 1 KV heads takes of the numbers 0, 1, … of the whole parameter."""
    model = axes(architecture)
    runs = runs_of_whole(model, shard_layout(model, split(model, range(3), [1, 2, 1]), rank), param)
    return np.concatenate([np.arange(start, stop) for start, stop in runs])


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Phi3ForCausalLM"])
def test_heads_are_those_of_the_rank_in_q_k_and_v(architecture: str) -> None:
    q, k, v = np.arange(32), np.arange(32, 48), np.arange(48, 64)
    found = cut(architecture, "model.layers.0.self_attn.qkv_proj.weight", 1)
    np.testing.assert_array_equal(found, np.concatenate([q[8:24], k[4:12], v[4:12]]))
    np.testing.assert_array_equal(cut(architecture, "model.layers.0.self_attn.o_proj.weight", 1), q[8:24])


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Phi3ForCausalLM"])
def test_columns_of_gate_and_up_are_those_of_down(architecture: str) -> None:
    down = cut(architecture, "model.layers.0.mlp.down_proj.weight", 2)
    found = cut(architecture, "model.layers.0.mlp.gate_up_proj.weight", 2)
    np.testing.assert_array_equal(found, np.concatenate([down, 80 + down]))


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Phi3ForCausalLM"])
def test_a_whole_parameter_has_all_that_it_stacks(architecture: str) -> None:
    model = axes(architecture)
    assert whole_shape(model, "model.layers.0.self_attn.qkv_proj.weight") == (64, 64)
    assert whole_shape(model, "model.layers.0.mlp.gate_up_proj.weight") == (160, 64)
    assert whole_shape(model, "model.layers.0.mlp.down_proj.weight") == (64, 80)


def test_a_parameter_that_a_rank_does_not_have_is_an_error() -> None:
    with pytest.raises(KeyError, match="k_proj"):
        cut("Qwen3ForCausalLM", "model.layers.0.self_attn.k_proj.weight", 0)
