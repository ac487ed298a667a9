"""Copies of the files of LoRA adapters in main's memory, which all ranks read, whatever becomes of the files."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

__all__ = ["AdapterCopies", "adapter_files"]

_CONFIG = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt")
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class AdapterCopies:
    """Copies of adapters' files, by the ids that SGLang gives to adapters.

    Each is shown as a folder of links to this process's memory, below ``folder`` in the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, dict[str, int]] = {}

    def add(self, adapter_id: str, source: str) -> None:
        """Copy an adapter from its folder, or from the repository of the Hugging Face hub that ``source`` names.

        Raises ValueError, with a text for the operator, for one that cannot be read.
        """
        copies: dict[str, int] = {}
        try:
            for path in adapter_files(source):
                copies[path.name] = _copy(path)
        except BaseException as error:
            _close(copies.values())
            if isinstance(error, OSError):
                raise ValueError(f"the adapter in {source} cannot be read: {error}") from None
            raise
        self._files[adapter_id] = copies
        self.show()

    def path(self, adapter_id: str) -> str:
        """Return the folder that shows an adapter's copy."""
        return str(self._folder / adapter_id)

    def discard(self, adapter_id: str) -> None:
        """Free the memory of a copy once no rank reads it any more; do nothing if there is none."""
        if (copies := self._files.pop(adapter_id, None)) is not None:
            shutil.rmtree(self.path(adapter_id), ignore_errors=True)
            _close(copies.values())

    def show(self) -> None:
        """Make the links that are missing: a cleaner of files may have removed the run directory."""
        for adapter_id, copies in self._files.items():
            folder = Path(self.path(adapter_id))
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, fd in copies.items():
                with contextlib.suppress(FileExistsError):
                    (folder / name).symlink_to(f"/proc/{os.getpid()}/fd/{fd}")


def adapter_files(source: str) -> list[Path]:
    """Return the files of an adapter: its weights, and its JSON.

    ``source``: its folder, or its repository on the hub, which is downloaded unless the cache has it, as SGLang does.
    Raises ValueError for one that lacks its configuration or its weights, OSError if it cannot be read.
    """
    folder = Path(source) if os.path.isdir(source) else _snapshot(source)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", *_WEIGHTS) and path.is_file()]
    if not any(path.name == _CONFIG for path in files):
        raise ValueError(f"the adapter in {source} has no {_CONFIG}")
    if not any(path.suffix in _WEIGHTS for path in files):
        raise ValueError(f"the adapter in {source} has no file of weights (*.safetensors, *.bin)")
    return files


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", *(f"*{suffix}" for suffix in _WEIGHTS)]))
    except Exception as error:  # of the network, the hub, its cache, and for what is no repository's name
        raise ValueError(f"the adapter {name} is no folder, and no repository that can be had: {error}") from None


def _copy(path: Path) -> int:
    fd = os.memfd_create(f"anchortp-adapter-{path.name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with path.open("rb") as source, open(fd, "wb", closefd=False) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
