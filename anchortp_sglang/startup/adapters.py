"""Checks of a server's LoRA flags and adapters at its start, and what is inferred from them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anchortp_sglang.planning.model.axes import ModelAxes, UnsupportedModel

_SERVED = {"q_head", "kv_head", "mlp", "vocab"}
"""Axes of models whose adapters are cut by our rules."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The modules that PEFT's "all-linear" names in models of these axes."""


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


def uses_adapters(view: Any) -> bool:
    """Return whether resolved ServerArgs ask for LoRA, as SGLang takes them."""
    return bool(view.enable_lora or (view.lora_paths and view.enable_lora is None))


def shapes_of(view: Any, adapters: Sequence[Any]) -> dict[str, Any]:
    """Return --max-lora-rank and --lora-target-modules, unless they are given, as SGLang infers them from ``adapters``.

    So buffers stay as they are when new ranks cannot read one of them. Raises ValueError if one cannot be read now.
    """
    from sglang.srt.lora.lora_config import LoRAConfig

    if not adapters or (view.max_lora_rank is not None and view.lora_target_modules):
        return {}
    ranks, modules = [0], set[str]()
    for adapter in adapters:
        try:
            config = LoRAConfig(adapter.lora_path)
            ranks.append(int(config.r))
            modules.update(_LINEAR if isinstance(config.target_modules, str) else config.target_modules)
        except Exception as error:  # files, JSON, the hub
            raise ValueError(
                f"--lora-paths: the adapter {adapter.lora_name} in {adapter.lora_path} cannot be read: {error!r}"
            ) from None
    inferred = {"max_lora_rank": max(ranks), "lora_target_modules": sorted(modules)}
    return {name: value for name, value in inferred.items() if not getattr(view, name)}


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
