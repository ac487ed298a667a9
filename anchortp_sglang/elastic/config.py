"""Every rank sees a model config whose even split is its own share.

On rank r each shardable size S becomes local_r(S) * tp_size: SGLang divides by tp_size and gets local_r(S) in
attention modules, MLPs, the KV pool and every attention backend, with all its assertions intact.
"""

from collections.abc import Callable
from typing import Any

from anchortp_sglang.elastic.attachment import Attachment, current
from anchortp_sglang.planning.model_axes import ModelAxes

_DONE = "_anchortp_scaled"


def after_from_server_args(model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER ModelConfig.from_server_args (called twice per rank, in Scheduler and in TpModelWorker)."""
    attachment = current()
    if attachment is not None and not getattr(model_config, _DONE, False):
        _scale(model_config, attachment)
        setattr(model_config, _DONE, True)
    return model_config


class _HeadCount(int):
    """The pretended number of query heads, by which the hidden size still divides into heads of the true size: some
    model files (mixtral.py among them) do not read ``head_dim``."""

    _model: ModelAxes

    def __new__(cls, heads: int, model: ModelAxes) -> "_HeadCount":
        count = super().__new__(cls, heads)
        count._model = model
        return count

    def __rfloordiv__(self, size: int) -> int:
        return self._model.head_dim if size == self._model.hidden_size else size // int(self)


def _scale(model_config: Any, attachment: Attachment) -> None:
    at = attachment.assignment
    model, tp_size = at.model, at.ownership.tp_size
    sizes = {
        "num_attention_heads": _HeadCount(at.ownership.units("q_head", at.rank) * tp_size, model),
        "num_key_value_heads": at.ownership.units("kv_head", at.rank) * tp_size,
        **{
            each.config_key: at.ownership.units(each.axis, at.rank) * each.unit * tp_size
            for each in model.columns
            if each.config_key is not None
        },
    }
    for config in _hf_configs(model_config):
        for name, size in sizes.items():
            if hasattr(config, name):
                setattr(config, name, size)
        # Many model files derive head_dim as hidden_size // num_attention_heads unless the config names it.
        config.head_dim = model.head_dim
        # models/qwen2.py derives it from this one on CPU, where update_config.py sets it.
        config.original_num_attention_heads = model.num_q_heads
        config.original_total_num_kv_heads = model.num_kv_heads
    model_config.num_attention_heads = sizes["num_attention_heads"]
    model_config.num_key_value_heads = sizes["num_key_value_heads"]
    if model_config.head_dim != model.head_dim:
        raise RuntimeError(f"SGLang reads head_dim={model_config.head_dim}, the plan {model.head_dim}")


def _hf_configs(model_config: Any) -> list[Any]:
    configs = {id(c): c for c in (model_config.hf_config, model_config.hf_text_config) if c is not None}
    return list(configs.values())


def around_unaligned_cpu_tp(original: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int) -> Any:
    """AROUND update_config.adjust_config_with_unaligned_cpu_tp: it would pad the shares we already made."""
    if current() is None:
        return original(model_config, load_config, tp_size)
    return model_config
