"""Finds the folder of a model that is named by its repository on the Hugging Face hub, as SGLang does.

A snapshot in the local cache is used if it is complete; else the repository is downloaded, unless HF_HUB_OFFLINE is
set. All processes of a server then read one folder, whatever happens on the hub.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
_DOWNLOAD = (
    "import json, sys; from huggingface_hub import snapshot_download; snapshot_download(**json.loads(sys.argv[1]))"
)
_INDEX = "model.safetensors.index.json"


def named_snapshot(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the flags, by field, that replace a ``model_path`` which names a repository; none if it does not.

    They are the folder of its snapshot, and the name under which SGLang then serves the model. ``given``: flags by
    field; ``revision`` and ``download_dir`` count. Raises ValueError for the operator.
    """
    name = given.get("model_path")
    if name is None or Path(name).exists() or not _is_repository(name):
        return {}
    about = {"repo_id": name, "revision": given.get("revision"), "cache_dir": given.get("download_dir")}
    found = _cached(about)
    if found is None:
        _download(about)
        found = _cached(about)
    if found is None:
        raise ValueError(f"--model-path {name}: the repository has no safetensors checkpoint with a config.json")
    return {"model_path": str(found), "served_model_name": given.get("served_model_name") or name}


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # names without an owner are old, and more likely a folder that is missing


def _cached(about: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(**about, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Return whether the weights are there: SGLang may have cached a repository's config alone."""
    if not (folder / "config.json").exists():
        return False
    index = folder / _INDEX
    if not index.exists():
        return any(folder.glob("*.safetensors"))
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all((folder / file).exists() for file in files)


def _download(about: Mapping[str, Any]) -> None:
    """Download the repository, in a process of its own: the threads of a download would keep this one from forking."""
    name = about["repo_id"]
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(
            f"--model-path {name} is no folder, and its repository is not in the cache; HF_HUB_OFFLINE forbids a"
            " download: give the folder of a Hugging Face checkpoint, or download it first"
        )
    print(f"anchortp: downloading {name} …", file=sys.stderr, flush=True)
    wanted = json.dumps({**about, "allow_patterns": _PATTERNS})
    done = subprocess.run([sys.executable, "-c", _DOWNLOAD, wanted], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"--model-path {name} is no folder, and its repository could not be downloaded ({reason});"
            " give the folder of a Hugging Face checkpoint, or check --revision, HF_TOKEN and the network"
        )
