"""Every family's checkpoint of random weights is what transformers and SGLang take for a released one."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint
from anchortp_sglang.testing.tiny_families import FAMILIES, Family
from anchortp_sglang.testing.tiny_wrappers import WRAPPED

NEW = [family for family in FAMILIES if family not in ("llama", "qwen2", "qwen3")]
SMALL: dict[str, Any] = {"num_layers": 3, "hidden_size": 96, "num_q_heads": 6, "num_kv_heads": 2}
SMALL |= {"intermediate_size": 64, "moe_intermediate_size": 16}
PROMPT = [40, 41, 42, 300]

# What SGLang's load_weights reads of one expert; transformers keeps all of a layer in one tensor.
EXPERTS = {
    "mixtral": "block_sparse_moe.experts.{expert}.{projection}.weight",
    "qwen3_moe": "mlp.experts.{expert}.{projection}_proj.weight",
    "deepseek_v2": "mlp.experts.{expert}.{projection}_proj.weight",
    "deepseek_v3": "mlp.experts.{expert}.{projection}_proj.weight",
}
PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take longer than these small models, where a core is busy already."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def default_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's checkpoint of default shape, written once."""
    return cache(lambda family: write_checkpoint(tmp_path_factory.mktemp(family), family))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path / "model.safetensors", framework="np") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


def transformers_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the model that transformers builds from the config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == config_of(path)["architectures"][0]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model with the checkpoint's weights, and what was left over, by kind."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype="float32", output_loading_info=True)
    return model, {kind: names for kind, names in info.items() if names}


def test_the_table_has_every_family_under_its_name() -> None:
    assert set(FAMILIES) == set(get_args(Family))


@pytest.mark.parametrize("family", NEW)
def test_names_and_shapes_are_those_of_transformers_and_experts_come_one_by_one(tmp_path: Path, family: Any) -> None:
    stored = shapes_of(write_checkpoint(tmp_path, family, **SMALL))
    expected = transformers_shapes(tmp_path)
    if family in EXPERTS:
        expected = {name: shape for name, shape in expected.items() if ".mlp.experts." not in name}
        if family == "mixtral":
            expected = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): s for name, s in expected.items()}
        config = config_of(tmp_path)
        hidden, inner = SMALL["hidden_size"], SMALL["moe_intermediate_size"]
        for layer in range(config.get("first_k_dense_replace", 0), SMALL["num_layers"]):
            for expert in range(FAMILIES[family].num_experts):
                for number, projection in enumerate(PROJECTIONS.get(family, ("gate", "up", "down"))):
                    name = EXPERTS[family].format(expert=expert, projection=projection)
                    expected[f"model.layers.{layer}.{name}"] = (hidden, inner) if number == 2 else (inner, hidden)
    assert stored == expected


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("mistral", {"head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3_moe", {"num_dense_layers": 1, "attention_bias": True, "num_experts": 4, "experts_per_token": 1}),
        ("deepseek_v2", {"q_lora_rank": 0, "num_dense_layers": 2}),
        ("deepseek_v3", {"num_experts": 16, "experts_per_token": 4}),
        ("gpt_oss", {"num_experts": 5, "experts_per_token": 3}),
    ],
)
def test_transformers_loads_other_shapes_with_nothing_missing_or_left_over(
    tmp_path: Path, family: Any, shape: dict[str, Any]
) -> None:
    assert load(write_checkpoint(tmp_path, family, **(SMALL | shape)))[1] == {}


@pytest.mark.parametrize("model_type", WRAPPED)
def test_transformers_loads_multimodal_models_with_nothing_missing_or_left_over(
    tmp_path: Path, model_type: Any
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = write_checkpoint(tmp_path, model_type, **SMALL)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == config_of(folder)["architectures"][0]
    assert {kind: names for kind, names in info.items() if names} == {}


def test_a_tensor_that_is_not_there_would_be_noticed(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, "mixtral", **SMALL) / "model.safetensors"
    gone = "model.layers.1.block_sparse_moe.gate.weight"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != gone}, file, {"format": "pt"})
    assert load(tmp_path)[1] == {"missing_keys": {"model.layers.1.mlp.gate.weight"}}


@pytest.mark.parametrize("family", NEW)
def test_greedy_decoding_wanders_at_the_default_shape(default_checkpoint: Any, family: Any) -> None:
    import torch

    model, left_over = load(default_checkpoint(family))
    assert left_over == {}
    prompt = torch.tensor([PROMPT])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    answer = output[0, len(PROMPT) :].tolist()
    assert len(answer) == 24, "the end token must not be sampled"
    assert len(set(answer)) > 12


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mistral", {"sliding_window": None}),
        ("phi3", {"sliding_window": None, "num_key_value_heads": 4}),
        ("glm4", {"attention_bias": True, "head_dim": 32}),
        ("gemma2", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 4096}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 512}),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}),
        ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True, "mlp_only_layers": []}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 128}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "first_k_dense_replace": 1}),
        ("deepseek_v3", {"scoring_func": "sigmoid", "topk_group": 2, "n_shared_experts": 1, "kv_lora_rank": 64}),
    ],
)
def test_autoconfig_understands_the_config(default_checkpoint: Any, family: Any, expected: dict[str, Any]) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(default_checkpoint(family))
    assert config.model_type == family
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_says_nothing_of_its_tied_embeddings_as_the_released_configs(
    default_checkpoint: Any, family: Any
) -> None:
    path = default_checkpoint(family)
    assert "tie_word_embeddings" not in config_of(path)
    assert "lm_head.weight" not in shapes_of(path)


def test_norms_of_gemma_are_offsets_from_one(default_checkpoint: Any) -> None:
    tensors = load_file(default_checkpoint("gemma2") / "model.safetensors")
    assert abs(float(np.mean(tensors["model.norm.weight"]))) < 0.1
    assert abs(float(np.mean(tensors["model.layers.0.input_layernorm.weight"]))) < 0.1


@pytest.mark.parametrize(
    ("family", "shape", "reason"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"head_dim": 32}, "head_dim"),
        ("olmo2", {"hidden_size": 100}, "multiple of num_q_heads"),
        ("mixtral", {"num_dense_layers": 1}, "num_dense_layers"),
        ("mixtral", {"num_experts": 0}, "num_experts is 0"),
        ("qwen3_moe", {"experts_per_token": 17}, "experts_per_token"),
        ("deepseek_v2", {"num_experts": 6}, "4 groups"),
        ("deepseek_v3", {"experts_per_token": 5}, "experts_per_token"),
    ],
)
def test_shapes_that_a_family_cannot_have_are_refused_with_the_reason(
    tmp_path: Path, family: Any, shape: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        write_checkpoint(tmp_path, family, **(SMALL | shape))
