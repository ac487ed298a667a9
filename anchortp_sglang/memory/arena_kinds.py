"""Which arena an anchor makes: a value that main chooses, and that fits on the anchor's command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from anchortp_sglang.memory.arena import Arena, MemfdArena
from anchortp_sglang.memory.gpu import GpuShare

__all__ = ["ARENA_KINDS", "HOST_MEMORY", "ArenaKind", "ArenaSpec", "make_arena"]

ArenaKind = Literal["memfd", "vmm", "ipc"]
"""``memfd``: host memory. ``vmm`` and ``ipc``: a GPU's, by the two ways of ``memory.gpu.Sharing``."""

ARENA_KINDS: tuple[ArenaKind, ...] = get_args(ArenaKind)


@dataclass(frozen=True)
class ArenaSpec:
    """The kind of an arena and its arguments: of which GPU (``uuid``) and how much of it, for kinds that need that."""

    kind: ArenaKind = "memfd"
    uuid: str = ""
    budget_bytes: int = 0

    @property
    def seal_travels(self) -> bool:
        """Whether a segment's name, size and seal can be read from its handle, in whichever process it is open."""
        return self.kind == "memfd"

    @property
    def packages(self) -> tuple[str, ...]:
        """Top-level packages that the arena imports besides what every anchor does."""
        return () if self.kind == "memfd" else ("cuda", "pynvml")


HOST_MEMORY = ArenaSpec()


def make_arena(spec: ArenaSpec) -> Arena:
    """Make the arena, in the anchor. Raises ArenaError if its device cannot be reached."""
    return _MAKERS[spec.kind](spec)


def _make_memfd(spec: ArenaSpec) -> Arena:
    return MemfdArena()


def _make_vmm(spec: ArenaSpec) -> Arena:
    from anchortp_sglang.memory.cuda_vmm import VmmArena

    return VmmArena(GpuShare(spec.uuid, spec.budget_bytes, "vmm"))


def _make_ipc(spec: ArenaSpec) -> Arena:
    from anchortp_sglang.memory.cuda_ipc import IpcArena

    return IpcArena(GpuShare(spec.uuid, spec.budget_bytes, "ipc"))


_MAKERS: dict[ArenaKind, Callable[[ArenaSpec], Arena]] = {"memfd": _make_memfd, "vmm": _make_vmm, "ipc": _make_ipc}
