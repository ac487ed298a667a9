"""Reads slices of a safetensors checkpoint, by tensor name."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from anchortp_sglang.planning.layout.moves import Move
from anchortp_sglang.planning.layout.shards import Piece
from anchortp_sglang.planning.model.wrappers import language_tensor

_PLAIN = {torch.float32, torch.float16, torch.bfloat16}


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete or damaged; the text names the file and the remedy."""


class Checkpoint:
    """An open checkpoint folder (model.safetensors, or shards with model.safetensors.index.json)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}
        """A tensor's file and its name there, by its name in a checkpoint of the language model alone."""
        for path in _shards(folder):
            opened = self._stack.enter_context(_open(path))
            self._files |= {language_tensor(name): (opened, name) for name in list(opened.keys())}
        _check_index(folder, self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in self._files.items()}

    def fill(self, into: torch.Tensor, piece: Piece | Move) -> None:
        """Copy a piece's slice of a checkpoint tensor, converted to the dtype of ``into``. Raises like ``read``."""
        into.copy_(self.read(piece, into.dtype))

    def read(self, piece: Piece | Move, wanted: torch.dtype) -> torch.Tensor:
        """Read only the slice of a checkpoint tensor that a piece, or a move of the kind "reload", needs.

        It has the dtype in which it is stored; a copy converts it to ``wanted`` if both are plain floats. Raises
        CheckpointError for quantized tensors of another dtype.
        """
        found = self._slice(piece)
        if found.dtype != wanted and not {found.dtype, wanted} <= _PLAIN:
            raise CheckpointError(
                f"{piece.source} is stored in {found.dtype}, config.json says {wanted}; copy the checkpoint again"
            )
        return found

    def _slice(self, piece: Piece | Move) -> torch.Tensor:
        file, name = self._files[piece.source]
        stored = file.get_slice(name)
        if not stored.get_shape():
            scalar: torch.Tensor = file.get_tensor(name)
            return scalar[None]
        dims = list(range(len(stored.get_shape())))
        if piece.transposed:
            dims[-2:] = reversed(dims[-2:])
        window = [slice(None)] * dims[piece.dim]
        window.append(slice(piece.source_start, piece.source_start + piece.length))
        found: torch.Tensor = stored[tuple(window)]
        return found.transpose(-2, -1) if piece.transposed else found


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = [folder / name for name in sorted(set(_weight_map(index).values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
        # Mistral's releases have the same weights twice; `filter_duplicate_safetensors_files` reads the second.
        if [path.name for path in paths] == ["consolidated.safetensors", "model.safetensors"]:
            del paths[0]
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors file; convert the checkpoint to safetensors")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint again")
    return paths


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}); copy it again") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); copy it again") from error


def _check_index(folder: Path, files: dict[str, Any]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return
    absent = sorted(set(map(language_tensor, _weight_map(index))) - files.keys())
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} tensors of the index are in no file ({absent[0]}, …)")
