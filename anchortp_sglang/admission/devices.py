"""Rules for flags that concern the device, as data that each platform gives."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DeviceRules"]


@dataclass(frozen=True)
class DeviceRules:
    """Flags that fit one ``device``, as ServerArgs spells it.

    ``attention_backends``: those with kernels for its ranks. ``lora_backends``: those that LoRA has been tried with;
    with none, it is refused. ``why_no_fp8_kv``: the reason for refusing a KV cache of 8-bit floats, empty if it may
    have one.
    """

    device: str
    attention_backends: tuple[str, ...]
    lora_backends: tuple[str, ...] = ()
    why_no_fp8_kv: str = ""
