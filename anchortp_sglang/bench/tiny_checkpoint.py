"""A small checkpoint of random weights in Hugging Face's format, for tests and demonstrations.

The spread of the weights is chosen so that greedy decoding wanders (about 45 distinct tokens in 48):
default initialisation repeats one token and hides every error. Needs neither torch nor a download.

    python -m anchortp_sglang.bench.tiny_checkpoint /tmp/tiny --family qwen3
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors.numpy import save_file

from anchortp_sglang.bench.tiny_tokenizer import (
    END_OF_TEXT,
    PAD,
    SMALLEST_VOCAB,
    TURN_END,
    special_token_ids,
    write_tokenizer,
)

Family = Literal["llama", "qwen2", "qwen3"]
DType = Literal["float32", "float16", "bfloat16"]

_ARCHITECTURE: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_THETA = 10000.0
_EMBEDDING_STD = 0.9
# Tied, the residual stream would vote for the token that came in: the layers must outweigh it.
_TIED_EMBEDDING_STD = 0.2
_MATRIX_STD_AT_FAN_IN_320 = 0.11
_NORM_STD = 0.05
_BIAS_STD = 0.02
# Random weights must not end an answer: rows of special tokens are small, so their logits stay near zero.
_SPECIAL_ROW_SCALE = 0.05


@dataclass(frozen=True)
class TinyModel:
    """What shape the checkpoint has. `hidden_size` None: 320 for qwen3, 384 for the others, whose heads
    have hidden_size / num_q_heads columns unless `head_dim` says otherwise (qwen3: 32)."""

    family: Family
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int | None
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.family not in _ARCHITECTURE:
            raise ValueError(f"unknown family {self.family!r}; choose one of {', '.join(_ARCHITECTURE)}")
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_q_heads} q heads are not a multiple of {self.num_kv_heads} kv heads")
        if self.family == "llama" and self.hidden_size % self.num_q_heads:
            raise ValueError(
                f"LlamaConfig refuses hidden_size {self.hidden_size} with {self.num_q_heads} heads: "
                "give a hidden_size that is a multiple of num_q_heads"
            )
        if self.head_columns % 2:
            raise ValueError(f"head_dim {self.head_columns} is odd, rotary embeddings need it even")
        if self.vocab_size < SMALLEST_VOCAB:
            raise ValueError(f"vocab_size {self.vocab_size} is below {SMALLEST_VOCAB}")

    @property
    def head_columns(self) -> int:
        return self.head_dim or self.hidden_size // self.num_q_heads

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2" or self.attention_bias

    def config(self, dtype: DType) -> dict[str, Any]:
        ids = special_token_ids(self.vocab_size)
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURE[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_q_heads,
            "num_key_value_heads": self.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": 1e-6,
            "rope_theta": _ROPE_THETA,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[TURN_END],
            "pad_token_id": ids[PAD],
        }
        if self.head_dim is not None:
            config["head_dim"] = self.head_dim
        if self.family != "qwen2":
            config["attention_bias"] = self.attention_bias
        if self.family != "llama":
            config["use_sliding_window"] = False
        return config

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes as transformers' {Llama,Qwen2,Qwen3}ForCausalLM stores them, in layer order."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_q_heads * self.head_columns, self.num_kv_heads * self.head_columns
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
            for projection, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
                yield f"{attention}.{projection}.weight", (rows, hidden)
                if self.qkv_bias:
                    yield f"{attention}.{projection}.bias", (rows,)
            if self.family == "qwen3":
                yield f"{attention}.q_norm.weight", (self.head_columns,)
                yield f"{attention}.k_norm.weight", (self.head_columns,)
            yield f"{attention}.o_proj.weight", (hidden, q_rows)
            if self.attention_bias and self.family != "qwen2":
                yield f"{attention}.o_proj.bias", (hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{mlp}.gate_proj.weight", (inner, hidden)
            yield f"{mlp}.up_proj.weight", (inner, hidden)
            yield f"{mlp}.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (self.vocab_size, hidden)


def write_checkpoint(
    path: Path,
    family: Family,
    *,
    hidden_size: int | None = None,
    num_layers: int = 6,
    num_q_heads: int = 12,
    num_kv_heads: int = 4,
    head_dim: int | None = None,
    intermediate_size: int = 768,
    vocab_size: int = 512,
    tie_word_embeddings: bool = False,
    attention_bias: bool = False,
    dtype: DType = "float32",
    shards: int = 1,
    seed: int = 0,
    max_position_embeddings: int = 8192,
) -> Path:
    """Write a checkpoint that transformers and SGLang load, and return its folder.

    A tensor's values depend on the seed, its name and its shape alone, never on `shards`. `hidden_size`
    and `head_dim`: see `TinyModel`. `attention_bias` says nothing for qwen2, which always has a qkv bias.
    """
    if dtype not in get_args(DType):
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(get_args(DType))}")
    model = TinyModel(
        family=family,
        hidden_size=hidden_size or (320 if family == "qwen3" else 384),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or (32 if family == "qwen3" else None),
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=attention_bias,
        max_position_embeddings=max_position_embeddings,
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: _random_tensor(name, shape, model, seed) for name, shape in model.tensor_shapes()}
    _write_weights(path, {name: tensor.astype(_numpy_dtype(dtype)) for name, tensor in tensors.items()}, shards)
    write_tokenizer(path, vocab_size, max_position_embeddings)
    config = model.config(dtype)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
    return path


def _random_tensor(name: str, shape: tuple[int, ...], model: TinyModel, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + _NORM_STD * noise
    if name.endswith(".bias"):
        return _BIAS_STD * noise
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        noise[min(special_token_ids(model.vocab_size).values()) :] *= _SPECIAL_ROW_SCALE
    if name == "model.embed_tokens.weight":
        return (_TIED_EMBEDDING_STD if model.tie_word_embeddings else _EMBEDDING_STD) * noise
    return _matrix_std(shape[1]) * noise


def _matrix_std(fan_in: int) -> float:
    return _MATRIX_STD_AT_FAN_IN_320 * sqrt(320 / fan_in)


def _numpy_dtype(dtype: DType) -> np.dtype:
    if dtype == "bfloat16":
        import ml_dtypes  # numpy itself has no bfloat16

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def _write_weights(path: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """One model.safetensors, or `shards` files of about equal bytes with an index beside them."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{shards} shards asked for {len(tensors)} tensors")
    for stale in path.glob("model*.safetensors*"):
        stale.unlink()
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, shard in _shard_of_tensor({n: t.nbytes for n, t in tensors.items()}, shards).items():
        files.setdefault(f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", {})[name] = tensors[name]
    for file_name, content in files.items():
        save_file(content, path / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, content in files.items() for name in content}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _shard_of_tensor(sizes: dict[str, int], shards: int) -> dict[str, int]:
    """Contiguous shards in the given order, each with a tensor at least, cut where the bytes suggest."""
    total, before, shard_of = sum(sizes.values()), 0, dict[str, int]()
    shard = 0
    for position, (name, nbytes) in enumerate(sizes.items()):
        left = len(sizes) - position
        wanted = int(before * shards / total)
        if position and shard < shards - 1 and (wanted > shard or left < shards - shard):
            shard += 1
        shard_of[name] = shard
        before += nbytes
    return shard_of


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tiny_checkpoint", description="Write a small random checkpoint.")
    parser.add_argument("path", type=Path, help="folder to write, made if missing")
    parser.add_argument("--family", choices=get_args(Family), default="qwen3")
    for name, default in (("num-layers", 6), ("num-q-heads", 12), ("num-kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("intermediate-size", 768), ("vocab-size", 512), ("shards", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--hidden-size", type=int, help="default: 320 for qwen3, else 384")
    parser.add_argument("--head-dim", type=int, help="default: 32 for qwen3, else hidden size / q heads")
    parser.add_argument("--max-position-embeddings", type=int, default=8192)
    parser.add_argument("--dtype", choices=get_args(DType), default="float32")
    parser.add_argument("--tie-word-embeddings", action="store_true")
    parser.add_argument("--attention-bias", action="store_true")
    options = vars(parser.parse_args(argv))
    try:
        print(write_checkpoint(options.pop("path"), options.pop("family"), **options))
    except ValueError as refusal:
        parser.error(str(refusal))


if __name__ == "__main__":
    main()
