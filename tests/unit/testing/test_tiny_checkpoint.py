"""A checkpoint of random weights is what transformers takes for a real one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint
from anchortp_sglang.testing.tiny_tokenizer import build_tokenizer

SMALL = {"num_layers": 2, "hidden_size": 96, "num_q_heads": 6, "num_kv_heads": 2, "intermediate_size": 64}
MULTI_BYTE = "Grüße, 世界 🙂🙃!\n  done"


def stored_tensors(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32, "attention_bias": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", {"hidden_size": 80, "attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_names_and_shapes_are_those_of_the_transformers_model(
    tmp_path: Path, family: Any, shape: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    write_checkpoint(tmp_path, family, **(SMALL | shape))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == family
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert {name: tensor.shape for name, tensor in stored_tensors(tmp_path).items()} == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tokenizer_loads_with_autotokenizer_and_round_trips_multi_byte_text(tmp_path: Path, family: Any) -> None:
    from transformers import AutoTokenizer

    write_checkpoint(tmp_path, family, **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 512
    assert tokenizer.decode(tokenizer.encode(MULTI_BYTE)) == MULTI_BYTE
    assert len(tokenizer.encode("🙂")) == 4, "a character must be split over several tokens"
    assert all(tokenizer.decode([token]) for token in range(512))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("vocab_size", [260, 512, 571, 8192])
def test_every_id_decodes_at_any_vocabulary_size(vocab_size: int) -> None:
    tokenizer = build_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert all(tokenizer.decode([token], skip_special_tokens=False) for token in range(vocab_size))
    assert tokenizer.decode(tokenizer.encode(MULTI_BYTE).ids) == MULTI_BYTE


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first, again, other = (
        write_checkpoint(tmp_path / name, "qwen3", seed=seed, **SMALL)
        for name, seed in (("first", 7), ("again", 7), ("other", 8))
    )
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    one, two = stored_tensors(first), stored_tensors(other)
    assert not any(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shards", [2, 5, 25])
def test_shards_hold_the_tensors_of_the_single_file_and_the_index_finds_each(tmp_path: Path, shards: int) -> None:
    single = write_checkpoint(tmp_path / "single", "qwen3", **SMALL)
    split = write_checkpoint(tmp_path / "split", "qwen3", shards=shards, **SMALL)
    assert len(list(split.glob("*.safetensors"))) == shards
    expected, found = stored_tensors(single), stored_tensors(split)
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for name, file in index["weight_map"].items():
        with safe_open(split / file, framework="np") as shard:
            assert name in shard.keys()  # noqa: SIM118


def test_rewriting_with_fewer_shards_leaves_no_stale_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3", shards=3, **SMALL)
    write_checkpoint(tmp_path, "qwen3", shards=1, **SMALL)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_stored_and_declared(tmp_path: Path, dtype: Any) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    write_checkpoint(tmp_path, "llama", dtype=dtype, **SMALL)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    with safe_open(tmp_path / "model.safetensors", framework="np") as shard:
        stored = shard.get_slice("lm_head.weight").get_dtype()
    assert stored == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_decoding_wanders_instead_of_repeating_one_token(tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path, "qwen3", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    prompt = torch.tensor([[40, 41, 42, 300]])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False)[
        0, 4:
    ].tolist()
    assert len(output) == 48, "the end token must not be sampled"
    assert len(set(output)) >= 30


@pytest.mark.parametrize(
    ("family", "shape", "reason"),
    [
        ("llama", {"hidden_size": 320}, "multiple of num_q_heads"),
        ("qwen3", {"num_kv_heads": 5}, "not a multiple"),
        ("qwen3", {"head_dim": 33}, "even"),
        ("qwen3", {"vocab_size": 100}, "vocab_size"),
        ("qwen3", {"num_layers": 0}, "at least 1"),
        ("qwen3", {"shards": 1000}, "shards"),
        ("gpt2", {}, "unknown family"),
        ("qwen3", {"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_impossible_shapes_are_refused_with_the_reason(
    tmp_path: Path, family: Any, shape: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        write_checkpoint(tmp_path, family, **shape)
