"""Copies of the files of LoRA adapters in main's memory, which all ranks read, whatever becomes of the files."""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil

from anchortp_sglang.memory.cgroups import memory_room

__all__ = ["AdapterCopies", "Files", "adapter_files", "adapter_folder", "copy_adapter"]

log = logging.getLogger(__name__)

_CONFIG, _ADDED_TOKENS = "adapter_config.json", "added_tokens.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
"""In SGLang's order (DefaultModelLoader._prepare_weights): files of the first kind that is there are read."""
_MOST_FILES = 100
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

Files = Mapping[str, IO[bytes]]
"""Copies of an adapter's files, by their names. Their memory is freed with these objects."""


class AdapterCopies:
    """The copies of adapters' files, by the ids that SGLang gives to adapters. Thread-safe.

    Each is shown as a folder of links to this process's memory, below ``folder`` in the run directory, which is removed
    if it is there. ``readers``: the number of ranks.
    """

    def __init__(self, folder: Path, readers: int = 1) -> None:
        self.readers = readers
        shutil.rmtree(folder, ignore_errors=True)  # links to the memory of a server that was killed
        self._folder = folder
        self._kept: dict[str, tuple[str, Files]] = {}
        self._stay: set[str] = set()
        self._lock = threading.Lock()

    def keep(self, adapter_id: str, source: str, files: Files, stays: bool = False) -> None:
        """Keep the copy of an adapter. ``source``: how the operator or a client has named it. Raises OSError.

        ``stays``: new ranks need it whatever becomes of the adapter, so it is never discarded.
        """
        with self._lock:
            self._kept[adapter_id] = source, files
            if stays:
                self._stay.add(adapter_id)
            self._show()

    def path(self, adapter_id: str) -> str:
        """Return the folder that shows an adapter's copy."""
        return str(self._folder / adapter_id)

    def source(self, path: str) -> str:
        """Return how the adapter was named whose copy ``path`` shows; ``path`` itself for any other."""
        with self._lock:
            source, _ = self._kept.get(os.path.basename(path), (path, {}))
        return source if path == self.path(os.path.basename(path)) else path

    def discard(self, adapter_id: str) -> bool:
        """Let go of a copy, if there is one that need not stay; return false if it has to.

        Ranks have what they have opened of it for as long as they want.
        """
        with self._lock:
            if adapter_id in self._stay:
                return False
            gone = self._kept.pop(adapter_id, None)
            if gone is not None:
                shutil.rmtree(self.path(adapter_id), ignore_errors=True)
        return True

    def close(self) -> None:
        """Let go of all copies."""
        with self._lock:
            self._kept.clear()

    def show(self) -> None:
        """Make the links that are missing: a cleaner of files may have removed the run directory.

        If that is not possible now, ranks cannot read these adapters, and the next attempt of a recovery tries again.
        """
        try:
            with self._lock:
                self._show()
        except OSError as error:
            log.warning("anchortp: the copies of adapters cannot be shown in %s: %s", self._folder, error)

    def _show(self) -> None:
        if not self._kept:
            return
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
        for adapter_id, (_, files) in self._kept.items():
            folder = Path(self.path(adapter_id))
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            for name, file in files.items():
                with contextlib.suppress(FileExistsError):
                    (folder / name).symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def copy_adapter(source: str, readers: int) -> Files:
    """Copy an adapter's files to memory. ``source``: as in ``adapter_folder``.

    Raises ValueError, with a text for the operator, for one that cannot be read, or of which this copy and those of
    ``readers`` ranks do not fit in memory.
    """
    try:
        paths = adapter_files(adapter_folder(source))
        size, room = sum(path.stat().st_size for path in paths), memory_room(psutil.virtual_memory().available)
        if size * (1 + readers) > room.nbytes:
            raise ValueError(f"the adapter in {source} takes {1 + readers} times {size >> 20} MiB, and {room}")
        return {path.name: _copy(path) for path in paths}
    except OSError as error:
        raise ValueError(f"the adapter in {source} cannot be read: {error}") from None


def adapter_folder(source: str) -> Path:
    """Return an adapter's folder: ``source``, or that of the repository on the Hugging Face hub that it names.

    The repository is downloaded unless the cache has it, as SGLang does. Raises ValueError if there is none of both.
    """
    from huggingface_hub import snapshot_download

    if os.path.isdir(source):
        return Path(source)
    wanted: Any = [_CONFIG, _ADDED_TOKENS]
    try:
        if (Path(snapshot_download(source, allow_patterns=wanted)) / _CONFIG).exists():
            wanted += _WEIGHTS
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # of the network, the hub, its cache, and for what is no repository's name
        raise ValueError(f"the adapter {source} is no folder, and no repository that can be had: {error}") from None


def adapter_files(folder: Path) -> list[Path]:
    """Return the files in an adapter's folder that SGLang reads.

    Raises ValueError for one that lacks its configuration or its weights, or has many files, OSError for no folder.
    """
    config, tokens = folder / _CONFIG, folder / _ADDED_TOKENS
    if not config.is_file():
        raise ValueError(f"the adapter in {folder} has no {_CONFIG}")
    kinds = ([path for path in sorted(folder.glob(kind)) if path.is_file()] for kind in _WEIGHTS)
    weights = next((kind for kind in kinds if kind), [])
    if not weights or len(weights) > _MOST_FILES:
        raise ValueError(f"the adapter in {folder} has {len(weights)} files of weights, not 1 to {_MOST_FILES}")
    _check_headers(weights)
    return [config, *([tokens] if tokens.is_file() else []), *weights]


def _check_headers(weights: list[Path]) -> None:
    """Raise ValueError for a file in the format of safetensors that is longer or shorter than its header says."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="np"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None


def _copy(path: Path) -> IO[bytes]:
    copy = open(os.memfd_create("anchortp-adapter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb")  # noqa: SIM115 - kept
    with path.open("rb") as source:
        left = os.fstat(source.fileno()).st_size
        while left > 0 and (part := source.read(min(left, 1 << 20))):
            copy.write(part)
            left -= len(part)
    copy.flush()
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    return copy
