"""Finds the folder of a model that is named by its repository on the Hugging Face hub, as SGLang does.

A snapshot in the local cache is used if it is complete; else the repository is downloaded, unless HF_HUB_OFFLINE is
set. All processes of a server then read one folder, whatever happens on the hub.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CONFIG = ("config.json",)
_WEIGHTS = "*.safetensors"
_ALL = (_WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_DOWNLOAD = (
    "import json, sys; from huggingface_hub import snapshot_download; snapshot_download(**json.loads(sys.argv[1]))"
)
_INDEX = "model.safetensors.index.json"
_TRUE = ("1", "ON", "YES", "TRUE")


def named_snapshot(given: Mapping[str, Any], check: Callable[[Path], None] = lambda folder: None) -> dict[str, str]:
    """Return the flags, by field, that replace a ``model_path`` which names a repository; none if it does not.

    They are the folder of its snapshot, and the name under which SGLang then serves the model. ``given``: flags by
    field; ``revision``, ``download_dir``, ``tokenizer_path`` and ``load_format`` count. ``check`` gets a folder with
    the config.json before weights are downloaded. Raises ValueError for the operator.
    """
    name = given.get("model_path")
    try:
        if name is None or Path(name).exists() or not _is_repository(name):
            return {}
        folder = _find(name, given, check)
    except OSError as error:
        raise ValueError(f"--model-path {name} cannot be read: {error}") from None
    return {"model_path": str(folder), "served_model_name": given.get("served_model_name") or name}


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # names without an owner are old, and more likely a folder that is missing


def _find(name: str, given: Mapping[str, Any], check: Callable[[Path], None]) -> Path:
    if _is_set("SGLANG_USE_MODELSCOPE"):
        raise ValueError(f"--model-path {name}: with SGLANG_USE_MODELSCOPE give the folder of a model, not its name")
    about = {
        "repo_id": name,
        "revision": given.get("revision") or None,
        "cache_dir": given.get("download_dir") or None,
    }
    needs_tokenizer, needs_weights = not given.get("tokenizer_path"), given.get("load_format") != "dummy"
    if (found := _cached(about)) is not None and _is_complete(found, needs_tokenizer, needs_weights):
        return found
    _download(about, _CONFIG)
    if (found := _cached(about)) is None or not (found / "config.json").exists():
        raise ValueError(f"--model-path {name}: the repository has no config.json")
    check(found)
    _download(about, _ALL if needs_weights else [pattern for pattern in _ALL if pattern != _WEIGHTS])
    if (found := _cached(about)) is None or not _is_complete(found, needs_tokenizer, needs_weights):
        raise ValueError(f"--model-path {name}: the repository lacks safetensors or a tokenizer")
    return found


def _cached(about: Mapping[str, Any]) -> Path | None:
    """Return the folder of a snapshot in the cache, be it complete or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(**about, local_files_only=True))
    except IncompleteSnapshotError as error:  # perhaps of files that nobody needs
        return Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None


def _is_complete(folder: Path, needs_tokenizer: bool, needs_weights: bool) -> bool:
    """Return whether a server can start from it: SGLang may have cached a repository's config alone."""
    if not (folder / "config.json").exists():
        return False
    if needs_tokenizer and not any((folder / name).exists() for name in _TOKENIZERS):
        return False
    if not needs_weights:
        return True
    index = folder / _INDEX
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / file).exists() for file in files)


def _download(about: Mapping[str, Any], patterns: Sequence[str]) -> None:
    """Download files of a repository, in a process of its own: a download leaves threads, and they forbid a fork."""
    name = about["repo_id"]
    if _is_set("HF_HUB_OFFLINE"):
        raise ValueError(
            f"--model-path {name} is no folder, and the cache has no complete snapshot of its repository;"
            " HF_HUB_OFFLINE forbids a download: give the folder of a Hugging Face checkpoint, or download it first"
        )
    print(f"anchortp: downloading {name} ({', '.join(patterns)}) …", file=sys.stderr, flush=True)
    request = json.dumps({**about, "allow_patterns": patterns})
    if subprocess.run([sys.executable, "-c", _DOWNLOAD, request], check=False).returncode:
        raise ValueError(
            f"--model-path {name} is no folder, and its repository could not be downloaded (the reason is above);"
            " give the folder of a Hugging Face checkpoint, or check --revision, HF_TOKEN and the network"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in _TRUE
