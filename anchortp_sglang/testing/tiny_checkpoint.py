"""A small checkpoint of random weights in Hugging Face's format, for tests and demonstrations.

The spread of the weights makes greedy decoding wander (about 45 distinct tokens in 48): default initialisation repeats
one token, which hides every error. Needs neither torch nor a download.

    python -m anchortp_sglang.testing.tiny_checkpoint /tmp/tiny --family qwen3
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from safetensors.numpy import save_file

from anchortp_sglang.testing.tiny_configs import GROUPS_PER_TOKEN
from anchortp_sglang.testing.tiny_families import FAMILIES, Family, Spread
from anchortp_sglang.testing.tiny_layers import Part, Sizes, Tensors
from anchortp_sglang.testing.tiny_tokenizer import (
    END_OF_TEXT,
    PAD,
    SMALLEST_VOCAB,
    TURN_END,
    special_token_ids,
    write_tokenizer,
)
from anchortp_sglang.testing.tiny_wrappers import WRAPPED, TinyWrapper, Wrapped

DType = Literal["float32", "float16", "bfloat16"]

_EMBEDDING = "embed_tokens.weight"
_ROPE_THETA = 10000.0
_EMBEDDING_STD = 0.9
# With tied embeddings the residual stream favours the input token: the layers must outweigh it.
_TIED_EMBEDDING_STD = 0.2
_MATRIX_STD_AT_FAN_IN_320 = 0.11
_NORM_STD = 0.05
_BIAS_STD = 0.02
# Small rows of special tokens keep their logits near zero, so that random weights do not end an answer.
_SPECIAL_ROW_SCALE = 0.05


@dataclass(frozen=True)
class TinyModel:
    """A family with sizes that it can have."""

    family: Family
    sizes: Sizes
    wrapper: TinyWrapper | None = None
    """The multimodal model of which it is the language model."""

    def __post_init__(self) -> None:
        kind, sizes = FAMILIES[self.family], self.sizes
        least = {"num_experts": kind.num_experts and 1, "experts_per_token": kind.experts_per_token and 1}
        least |= {"num_dense_layers": 0, "q_lora_rank": 0}
        for name, size in ((f.name, getattr(sizes, f.name)) for f in fields(sizes) if f.type is int):
            if size < least.get(name, 1):
                raise ValueError(f"{name} is {size}; it must be at least {least.get(name, 1)}")
        if sizes.num_q_heads % sizes.num_kv_heads:
            raise ValueError(f"{sizes.num_q_heads} q heads are not a multiple of {sizes.num_kv_heads} kv heads")
        if kind.hidden_in_heads and sizes.hidden_size % sizes.num_q_heads:
            raise ValueError(
                f"{self.family} takes no hidden_size {sizes.hidden_size} with {sizes.num_q_heads} heads: "
                "give a hidden_size that is a multiple of num_q_heads"
            )
        if sizes.head_dim is not None and not kind.takes_head_dim:
            raise ValueError(f"{self.family} has no head_dim in its config; its heads follow from other sizes")
        if sizes.head_columns % 2:
            raise ValueError(f"head_dim {sizes.head_columns} is odd, rotary embeddings need it even")
        if sizes.attention_bias != kind.attention_bias and kind.attention_bias is not None:
            raise ValueError(f"{self.family} has no attention_bias")
        if sizes.num_dense_layers and kind.num_dense_layers is None:
            raise ValueError(f"{self.family} has no layers of another kind for num_dense_layers")
        reachable = sizes.num_experts // kind.expert_groups * min(kind.expert_groups, GROUPS_PER_TOKEN)
        if sizes.experts_per_token > reachable or sizes.num_experts % kind.expert_groups:
            raise ValueError(
                f"{sizes.num_experts} experts in {kind.expert_groups} groups are not enough or not alike for "
                f"{sizes.experts_per_token} experts_per_token"
            )
        if sizes.vocab_size < SMALLEST_VOCAB:
            raise ValueError(f"vocab_size {sizes.vocab_size} is below {SMALLEST_VOCAB}")

    def config(self, dtype: DType) -> dict[str, Any]:
        kind, sizes = FAMILIES[self.family], self.sizes
        ids = special_token_ids(sizes.vocab_size)
        config: dict[str, Any] = {
            "architectures": [kind.architecture],
            "model_type": self.family,
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.num_q_heads,
            "num_key_value_heads": sizes.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": sizes.max_position_embeddings,
            "rms_norm_eps": 1e-6,
            "rope_theta": _ROPE_THETA,
            "tie_word_embeddings": sizes.tie_word_embeddings,
            "torch_dtype": dtype,
            "bos_token_id": ids[END_OF_TEXT],
            "eos_token_id": ids[TURN_END],
            "pad_token_id": ids[PAD],
        }
        if sizes.head_dim is not None:
            config["head_dim"] = sizes.head_dim
        config |= {"attention_bias": sizes.attention_bias} | kind.config(sizes)
        config = {key: value for key, value in config.items() if key not in kind.omitted}
        if self.wrapper is None:
            return config
        return self.wrapper.config(sizes, config) | {"architectures": [self.wrapper.architecture]}

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of the tensors in the checkpoint, in layer order."""
        if self.wrapper is None:
            yield from self._language_tensors(FAMILIES[self.family].layer)
            return
        parts = dict(enumerate(FAMILIES[self.family].layer)) | dict(self.wrapper.parts)
        for name, shape in self._language_tensors(tuple(parts.values())):
            yield self.wrapper.name(name), shape
        yield from self.wrapper.vision(self.sizes)

    def _language_tensors(self, layer_parts: tuple[Part, ...]) -> Tensors:
        sizes = self.sizes
        yield f"model.{_EMBEDDING}", (sizes.vocab_size, sizes.hidden_size)
        for layer in range(sizes.num_layers):
            for part in layer_parts:
                yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in part(sizes, layer))
        yield from FAMILIES[self.family].outside(sizes)
        yield "model.norm.weight", (sizes.hidden_size,)
        if not sizes.tie_word_embeddings:
            yield "lm_head.weight", (sizes.vocab_size, sizes.hidden_size)

    def spread(self, name: str, shape: tuple[int, ...]) -> Spread:
        for end, spread in FAMILIES[self.family].spread:
            if name.endswith(end):
                return spread
        if name.endswith("bias"):
            return 0.0, _BIAS_STD
        if len(shape) == 1:  # norms
            return 1.0, _NORM_STD
        if name.endswith(_EMBEDDING):
            return 0.0, _TIED_EMBEDDING_STD if self.sizes.tie_word_embeddings else _EMBEDDING_STD
        return 0.0, _MATRIX_STD_AT_FAN_IN_320 * sqrt(320 / shape[1])


def write_checkpoint(
    path: Path,
    family: Family | Wrapped,
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
    num_experts: int | None = None,
    experts_per_token: int | None = None,
    moe_intermediate_size: int = 96,
    num_dense_layers: int | None = None,
    sliding_window: int | None = None,
    q_lora_rank: int = 96,
    dtype: DType = "float32",
    shards: int = 1,
    seed: int = 0,
    max_position_embeddings: int = 8192,
) -> Path:
    """Write a checkpoint that transformers and SGLang load, and return its folder.

    A tensor's values depend on the seed, its name, its shape and its family alone, not on `shards`. None stands for
    the default of the family, or of a multimodal model's language model (`FAMILIES`); the default `head_dim` is
    hidden_size / num_q_heads. Sizes of parts that a family lacks are ignored (see `Sizes`), as are `attention_bias` and
    `tie_word_embeddings` where the family always has them. DeepSeek has as many KV heads as query heads.
    """
    if dtype not in get_args(DType):
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(get_args(DType))}")
    wrapper = WRAPPED.get(cast(Wrapped, family))
    language = cast(Family, family) if wrapper is None else wrapper.of
    if language not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of {', '.join((*FAMILIES, *WRAPPED))}")
    kind = FAMILIES[language]
    sizes = Sizes(
        hidden_size=hidden_size or kind.hidden_size,
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=num_q_heads if kind.kv_heads_are_q_heads else num_kv_heads,
        head_dim=head_dim or kind.head_dim,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        tie_word_embeddings=tie_word_embeddings or bool(kind.tied),
        attention_bias=attention_bias or bool(kind.attention_bias),
        max_position_embeddings=max_position_embeddings,
        num_experts=kind.num_experts if num_experts is None else num_experts,
        experts_per_token=kind.experts_per_token if experts_per_token is None else experts_per_token,
        moe_intermediate_size=moe_intermediate_size,
        num_dense_layers=(kind.num_dense_layers or 0) if num_dense_layers is None else num_dense_layers,
        sliding_window=sliding_window or kind.sliding_window,
        q_lora_rank=q_lora_rank,
    )
    model = TinyModel(language, sizes, wrapper)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: _random_tensor(name, shape, model, seed) for name, shape in model.tensor_shapes()}
    kind_of_number = _numpy_dtype(dtype)
    _write_weights(path, {name: tensor.astype(kind_of_number, copy=False) for name, tensor in tensors.items()}, shards)
    write_tokenizer(path, vocab_size, max_position_embeddings, parts_of_messages=wrapper is not None)
    for file, content in ({} if wrapper is None else wrapper.files).items():
        _write_json(path / file, dict(content))
    config = model.config(dtype)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
    return path


def _random_tensor(name: str, shape: tuple[int, ...], model: TinyModel, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith((_EMBEDDING, "lm_head.weight")):
        noise[min(special_token_ids(model.sizes.vocab_size).values()) :] *= _SPECIAL_ROW_SCALE
    mean, std = model.spread(name, shape)
    return mean + std * noise if mean else std * noise


def _numpy_dtype(dtype: DType) -> np.dtype:
    if dtype == "bfloat16":
        import ml_dtypes  # numpy itself has no bfloat16

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def _write_weights(path: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """Write one model.safetensors, or `shards` files of about equal size and their index."""
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
    """Assign tensors to shards of about equal bytes, in order; each shard has at least one."""
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
    parser.add_argument("--family", choices=(*get_args(Family), *WRAPPED), default="qwen3")
    for name, default in (("num-layers", 6), ("num-q-heads", 12), ("num-kv-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("intermediate-size", 768), ("vocab-size", 512), ("shards", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("hidden-size", "head-dim", "num-experts", "experts-per-token", "num-dense-layers", "sliding-window"):
        parser.add_argument(f"--{name}", type=int, help="default: the family's")
    for name, default in (("moe-intermediate-size", 96), ("q-lora-rank", 96)):
        parser.add_argument(f"--{name}", type=int, default=default)
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
