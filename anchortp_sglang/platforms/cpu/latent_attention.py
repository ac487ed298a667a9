"""Runs multi-head latent attention on torch_native in the latents' own space, as SGLang decodes on every backend.

For a prompt without a cached prefix SGLang 0.5.23 projects K and V of all heads anew and hands them to the backend.
torch_native reads the pool instead, which holds latents of another size, and fails.
"""

from collections.abc import Callable
from typing import Any

from anchortp_sglang.rank.attachment import current

BACKEND = "torch_native"

Handler = Callable[[Any, Any], Any]


def around_get_handler(original: Callable[[type, str], Handler], registry: type, backend_name: str) -> Handler:
    """AROUND AttentionBackendRegistry.get_handler (models/deepseek_common/attention_backend_handler.py)."""
    return absorbed if current() is not None and backend_name == BACKEND else original(registry, backend_name)


def absorbed(attention: Any, forward_batch: Any) -> Any:
    """Choose the forward method that absorbs the projections of K and V into those of queries and outputs."""
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    return AttnForwardMethod.MLA


def register() -> None:
    """Register ``absorbed`` in a process without our hooks."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    AttentionBackendRegistry.register(BACKEND, absorbed)
