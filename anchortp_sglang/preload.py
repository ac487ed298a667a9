"""What the zygote should have ready: modules, the tokenizer, first-use work. Runs in main, before the fork."""

import functools
import gc
import importlib
import logging
from typing import Any

log = logging.getLogger(__name__)

_MODULES = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.models.registry",
)


def import_sglang() -> None:
    """Import everything a rank imports at some point of its start."""
    gc.disable()  # with it on, importing SGLang takes twice as long
    try:
        for name in _MODULES:
            importlib.import_module(name)
    finally:
        gc.enable()


def preload(view: Any) -> None:
    """Load what every process of this server loads: tokenizer."""
    import_sglang()
    _tokenizer(view)


@functools.lru_cache(maxsize=4)
def _cached(original: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
    return original(*args, **dict(kwargs))


def around_get_tokenizer(original: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hf_transformers.tokenizer.get_tokenizer: main loads it before the fork, all children share it."""
    try:
        return _cached(original, args, tuple(sorted(kwargs.items())))
    except TypeError:  # an unhashable argument
        return original(*args, **kwargs)


def _tokenizer(view: Any) -> None:
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    get_tokenizer(
        view.tokenizer_path or view.model_path,
        tokenizer_mode=view.tokenizer_mode,
        trust_remote_code=view.trust_remote_code,
        revision=view.revision,
        tokenizer_backend=view.tokenizer_backend,
    )
