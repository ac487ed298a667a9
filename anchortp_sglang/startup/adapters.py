"""What a server with LoRA adapters checks at its start."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anchortp_sglang.planning.model.axes import ModelAxes, UnsupportedModel

_SERVED = {"q_head", "kv_head", "mlp", "vocab"}
"""Axes of models whose adapters are cut by our rules."""


def check_adapters(model: ModelAxes, rotate_heads: bool) -> None:
    """Refuse LoRA for models that it was not made for. Raises UnsupportedModel, or ValueError for a flag."""
    if model.latent_kv or model.axes.keys() - _SERVED:
        raise UnsupportedModel(
            f"--enable-lora: adapters of {model.architecture} are not supported, as it has experts or latent "
            "attention; merge the adapter into the checkpoint"
        )
    if rotate_heads:
        raise ValueError(
            "--enable-lora with --anchor-rotate-heads is not supported: SGLang's buffers of adapters have one size for "
            "all layers; leave one of them out"
        )


def check_adapter_flags(server_args: Any) -> None:
    """Resolve the flags of LoRA in a record of ranks, as SGLang does when it launches. Raises ValueError for a flag."""
    from sglang.srt.arg_groups.lora_hook import check_lora_server_args

    try:
        check_lora_server_args(server_args)
    except AssertionError as error:
        raise ValueError(str(error)) from None


def adapter_identity(adapters: Iterable[Any]) -> Iterator[str]:
    """Yield what tells adapters apart whose KV anchors hold: names, and sizes and times of their files.

    ``adapters``: SGLang's LoRARef.
    """
    for adapter in adapters:
        yield f"{adapter.lora_name}={adapter.lora_path}"
        for path in sorted(Path(adapter.lora_path).glob("*")):
            stat = path.stat()
            yield f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
