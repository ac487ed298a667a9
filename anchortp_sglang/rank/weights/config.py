"""Shows every rank a model config whose even split is its own share.

On rank r each shardable size S becomes local_r(S) * tp_size: SGLang divides by tp_size and gets local_r(S) in attention
modules, MLPs, the KV pool and every attention backend, with all its assertions intact. Where shares differ by layer,
the config has a layer's sizes while that layer is built, and otherwise the largest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anchortp_sglang.planning.model.gemma4 import WINDOW_KV_HEADS
from anchortp_sglang.rank.attachment import Assignment, Attachment, current

_DONE = "_anchortp_scaled"


def after_from_server_args(model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER ModelConfig.from_server_args (called twice per rank, in Scheduler and in TpModelWorker)."""
    attachment = current()
    if attachment is not None and not getattr(model_config, _DONE, False):
        _scale(model_config, attachment.assignment)
        setattr(model_config, _DONE, True)
    return model_config


class _HeadCount(int):
    """A pretended number of query heads by which the hidden size divides into heads of the true size.

    Some model files (mixtral.py among them) do not read ``head_dim``.
    """

    _hidden_size: int
    _head_dim: int

    def __new__(cls, heads: int, hidden_size: int, head_dim: int) -> "_HeadCount":
        count = super().__new__(cls, heads)
        count._hidden_size, count._head_dim = hidden_size, head_dim
        return count

    def __reduce__(self) -> tuple[type, tuple[int, int, int]]:  # gemma3_causal.py copies its config
        return type(self), (int(self), self._hidden_size, self._head_dim)

    def __rfloordiv__(self, size: int) -> int:
        return self._head_dim if size == self._hidden_size else size // int(self)

    def __rmod__(self, size: int) -> int:
        return 0 if size == self._hidden_size else size % int(self)


def _scale(model_config: Any, assignment: Assignment) -> None:
    model, sizes = assignment.model, _largest(assignment)
    _show(model_config, sizes)
    config = model_config.hf_text_config
    # Many model files derive head_dim as hidden_size // num_attention_heads unless the config names it.
    if not model.latent_kv:
        config.head_dim = model.head_dim
    # models/qwen2.py derives it from this one on CPU, where update_config.py sets it.
    config.original_num_attention_heads = model.num_q_heads
    config.original_total_num_kv_heads = model.num_kv_heads
    model_config.num_attention_heads = sizes["num_attention_heads"]
    model_config.num_key_value_heads = sizes["num_key_value_heads"]
    if not model.latent_kv and model_config.head_dim != model.head_dim:
        raise RuntimeError(f"SGLang reads head_dim={model_config.head_dim}, the plan {model.head_dim}")


def _largest(assignment: Assignment) -> dict[str, int]:
    by_layer = [_sizes(assignment, layer) for layer in range(assignment.model.num_layers)]
    return {name: max(sizes[name] for sizes in by_layer if name in sizes) for name in set[str]().union(*by_layer)}


def _sizes(assignment: Assignment, layer: int) -> dict[str, int]:
    """Return the pretended sizes of a layer, by their names in the config."""
    model, tp_size = assignment.model, assignment.ownership.tp_size
    q_heads = assignment.ownership.units("q_head", assignment.rank, layer) * model.heads_per_unit * tp_size
    kv_heads, window_kv_heads = (
        assignment.ownership.units(axis, assignment.rank, layer) * tp_size for axis in ("kv_head", model.window_kv_axis)
    )
    kv, sizes = model.kv[layer], {WINDOW_KV_HEADS: window_kv_heads}
    if kv is None or kv.axis == "kv_head":
        # Latent attention has no KV heads to divide: its configs have as many as query heads.
        sizes["num_key_value_heads"] = q_heads if model.latent_kv else kv_heads
    return sizes | {
        "num_attention_heads": _HeadCount(q_heads, model.hidden_size, model.head_dim),
        **{
            each.config_key: assignment.ownership.units(each.axis, assignment.rank, layer) * each.unit * tp_size
            for each in model.columns
            if each.config_key is not None
        },
    }


def _show(model_config: Any, sizes: dict[str, int]) -> None:
    config = model_config.hf_text_config
    for name, size in sizes.items():
        if hasattr(config, name):
            setattr(config, name, size)


@contextmanager
def building(attachment: Attachment, model_config: Any) -> Iterator[None]:
    """Show each layer that is made in this block (``around_make_layers``) its own sizes in this config."""
    attachment.built_config = model_config
    try:
        yield
    finally:
        attachment.built_config = None


def around_make_layers(
    original: Callable[..., Any], num_hidden_layers: int, layer_fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """AROUND utils.common.make_layers, which builds the decoder layers of a model one after the other."""
    attachment = current()
    model_config = None if attachment is None else attachment.built_config
    if attachment is None or model_config is None or not attachment.assignment.ownership.layers:
        return original(num_hidden_layers, layer_fn, *args, **kwargs)
    assignment = attachment.assignment
    if num_hidden_layers != assignment.model.num_layers:
        raise RuntimeError(f"SGLang makes {num_hidden_layers} layers, the plan has {assignment.model.num_layers}")

    def make_one(idx: int, prefix: str) -> Any:
        _show(model_config, _sizes(assignment, idx))
        return layer_fn(idx=idx, prefix=prefix)

    try:
        return original(num_hidden_layers, make_one, *args, **kwargs)
    finally:
        _show(model_config, _largest(assignment))


def around_unaligned_cpu_tp(original: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int) -> Any:
    """AROUND update_config.adjust_config_with_unaligned_cpu_tp: it would pad the shares that are made already."""
    if current() is None:
        return original(model_config, load_config, tp_size)
    return model_config
