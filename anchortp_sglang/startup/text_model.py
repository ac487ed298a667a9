"""Shows SGLang the language model of a multimodal checkpoint as a checkpoint of its own, in a folder of links.

The folder has a config.json of the language model, and nothing by which SGLang would load a processor of images. A
server then neither loads nor holds what turns images into embeddings, and a request with images gets a 400.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anchortp_sglang.planning.model.wrappers import changes_are_shown, shown_config
from anchortp_sglang.recovery import ending

log = logging.getLogger(__name__)

_CONFIG, _TEMPLATE = "config.json", "chat_template.json"
_LEFT_OUT = (_CONFIG, "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def show_language_model(server_args: Any) -> Path | None:
    """Let a record that names a multimodal checkpoint name the folder of its language model instead, and return that.

    The model keeps its name for clients. ``--json-model-override-args`` moves into the folder's config.json where
    SGLang would not apply it to the language model (Gemma-4). Returns None, and changes nothing, for any other
    checkpoint.
    """
    changes = json.loads(server_args.json_model_override_args or "{}")
    folder = text_folder(Path(server_args.model_path), changes)
    if folder is not None:
        if changes_are_shown(json.loads((folder / _CONFIG).read_text())):
            server_args.json_model_override_args = "{}"
        server_args.served_model_name = server_args.served_model_name or server_args.model_path
        server_args.model_path = str(folder)
    return folder


def text_folder(checkpoint: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Path | None:
    """Make a folder that shows a multimodal checkpoint's language model alone; None for any other checkpoint.

    ``changes``: keys of its config.json that the operator has set (``--json-model-override-args``). It is removed when
    main ends. Raises ValueError for a model that is not supported.
    """
    config = json.loads((checkpoint / _CONFIG).read_text())
    shown = shown_config(config, changes)
    if shown == config:
        return None
    folder = Path(tempfile.mkdtemp(prefix="anchortp-text-"))
    with contextlib.suppress(OSError):  # not every file system has locks
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)  # systemd-tmpfiles spares locked directories
    ending.on_end(lambda: remove(folder))
    atexit.register(remove, folder)  # not run by children, which end with os._exit
    for path in checkpoint.iterdir():
        if path.name not in _LEFT_OUT:
            (folder / path.name).symlink_to(path.resolve())
    (folder / _CONFIG).write_text(json.dumps(shown, indent=2) + "\n")
    _write_template(folder)
    log.info(
        "anchortp: the language model of %s is served, as %s: requests with images are refused",
        config["architectures"][0],
        shown["architectures"][0],
    )
    return folder


def remove(folder: Path) -> None:
    """Remove the folder, if it is still there."""
    shutil.rmtree(folder, ignore_errors=True)


def _write_template(folder: Path) -> None:
    """Write the chat template where tokenizers look for it; older releases have it in a processor's file alone."""
    old, new = folder / _TEMPLATE, folder / "chat_template.jinja"
    if old.exists() and not new.exists():
        read: Any = json.loads(old.read_text())
        template = read.get("chat_template") if isinstance(read, dict) else None
        if isinstance(template, str):
            new.write_text(template)
