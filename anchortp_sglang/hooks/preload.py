"""Loads modules and the tokenizer in main before the zygote is forked, so that all processes share them."""

import functools
import gc
import importlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchortp_sglang.hooks import grammar_backend

log = logging.getLogger(__name__)

_NEEDED = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.models.registry",
)

_LATE = (
    # A rank would otherwise import these in its __init__, which takes a tenth of a second.
    "sglang.srt.distributed.device_communicators.all_reduce_utils",
    "sglang.srt.distributed.device_communicators.custom_all_reduce",
    "sglang.srt.distributed.device_communicators.hpu_communicator",
    "sglang.srt.distributed.device_communicators.pymscclpp",
    "sglang.srt.distributed.device_communicators.shm_broadcast",
    "sglang.srt.distributed.device_communicators.torch_symm_mem",
    "sglang.srt.distributed.device_communicators.xpu_communicator",
    "sglang.srt.distributed.device_communicators.pcie_ipc_ar",
    "sglang.srt.dllm.algorithm",
    "sglang.srt.layers.attention.qsa",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.mem_cache.prefill_budget",
    "sglang.srt.mem_cache.rust_tree_core.adapter",
    "sglang.srt.mem_cache.rust_tree_core.extension",
    "sglang.srt.mem_cache.rust_tree_core.mem_cache",
    "anchortp_sglang.platforms.cpu.mover",
    "anchortp_sglang.platforms.cuda.device_memory",
    "anchortp_sglang.platforms.cuda.mover",
    "anchortp_sglang.rank.grammars",
    "anchortp_sglang.rank.penalties",
    "anchortp_sglang.rank.warmup",
)


_COMPILED = ("choice_loops", "equal_hashes", "follow_loops", "forest_loops", "hash_index", "run_loops")
"""Modules of kv/ that are compiled when they are imported."""
_COMPILE = "; ".join(f"import anchortp_sglang.kv.{name}" for name in _COMPILED)
_COMPILE_TIMEOUT_S = 60.0

_LEFT_OUT = "SGLANG_DISABLED_MODEL_ARCHS"


def leave_out_other_models(architectures: Sequence[str]) -> None:
    """Make SGLang's registry import only the modules, SGLang's or ours, that define ``architectures``, not 250 others.

    This saves seconds, and memory in every fork. Call it before SGLang is imported. The operator's setting stays. If no
    module defines one of them, nothing is left out, and SGLang reports the unknown model.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations or _LEFT_OUT in os.environ:
        return
    folders = (Path(spec.submodule_search_locations[0], "srt", "models"), Path(__file__).parent.parent / "models")
    modules = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    wanted = re.compile(rf"^class ({'|'.join(map(re.escape, architectures))})\b", re.MULTILINE)
    found = {name for name, path in modules.items() if wanted.search(path.read_text(encoding="utf-8"))}
    if architectures and found:
        os.environ[_LEFT_OUT] = ",".join(sorted(modules.keys() - found - {"__init__", "registry"}))


def import_sglang() -> None:
    """Import all that a rank imports when it starts, and compile what a recovery will run."""
    compiling = _compile_beside()
    # It warns of each model whose libraries are not installed; an unsupported model is refused by name.
    logging.getLogger("sglang.srt.models.registry").setLevel(logging.ERROR)
    gc.disable()  # with it on, importing SGLang takes twice as long
    try:
        for name in _NEEDED:
            importlib.import_module(name)
        for name in _LATE:
            _try_import(name)
        _await_end(compiling)
        for name in _COMPILED:
            importlib.import_module(f"anchortp_sglang.kv.{name}")
    finally:
        gc.freeze()  # each later collection would spend a second on these millions of objects
        gc.enable()


def _compile_beside() -> subprocess.Popen[bytes] | None:
    """Compile in another process if it has not been done here before: it takes 3 s, and the import of SGLang longer.

    numba keeps the result where this process will find it, mostly in ``kv/__pycache__``.
    """
    folder = Path(__file__).parents[1] / "kv"

    def is_done(name: str) -> bool:
        source = folder / f"{name}.py"
        indexes = (folder / "__pycache__").glob(f"{name}.*.nbi")
        return source.exists() and any(index.stat().st_mtime > source.stat().st_mtime for index in indexes)

    if all(map(is_done, _COMPILED)):
        return None
    return subprocess.Popen([sys.executable, "-c", _COMPILE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _await_end(compiling: subprocess.Popen[bytes] | None) -> None:
    if compiling is not None:
        try:
            compiling.wait(_COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            compiling.kill()
            compiling.wait()


def _try_import(name: str) -> None:
    """Import a module to save time. If that fails, a rank would do without it too."""
    try:
        importlib.import_module(name)
    except Exception as error:
        log.info("anchortp: %s is not preloaded (%s)", name, error)


def preload(view: Any) -> None:
    """Load SGLang's modules and the tokenizer, and what grammars need of it."""
    import_sglang()
    grammar_backend.prepare(view, _tokenizer(view))


@functools.lru_cache(maxsize=4)
def _cached(original: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
    return original(*args, **dict(kwargs))


def around_get_tokenizer(original: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hf_transformers.tokenizer.get_tokenizer: cache it, as main loads it before the fork for all children."""
    try:
        return _cached(original, args, tuple(sorted(kwargs.items())))
    except TypeError:  # an unhashable argument
        return original(*args, **kwargs)


def _tokenizer(view: Any) -> Any:
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    return get_tokenizer(
        view.tokenizer_path or view.model_path,
        tokenizer_mode=view.tokenizer_mode,
        trust_remote_code=view.trust_remote_code,
        revision=view.revision,
        tokenizer_backend=view.tokenizer_backend,
    )
