"""What the rest asks of CPU and CUDA: the interface that ``platforms/cpu`` and ``platforms/cuda`` implement.

A server's platform is chosen once, before SGLang is imported (``startup.device.choose_platform``). The server plan and
each rank's assignment carry it, pickled. Nothing outside ``platforms/`` asks which one it is: what differs is a
question of ``Platform``. Imports neither SGLang nor torch, and no module of an implementation may either when it is
imported, but for those that only ranks need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from anchortp_sglang.admission.devices import DeviceRules
from anchortp_sglang.memory.arena import Part
from anchortp_sglang.memory.arena_kinds import ArenaSpec
from anchortp_sglang.options import AnchorOptions
from anchortp_sglang.planning.layout.kv_layout import KVPlan, MirrorPlan
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership

if TYPE_CHECKING:
    import torch

    from anchortp_sglang.platforms.mover import Mover, Write

__all__ = ["Defaults", "DeviceWatch", "MemoryPlan", "Platform", "describe"]


class Platform(Protocol):
    """One kind of device. Implementations are frozen, small, equal if their fields are, and can be pickled.

    Devices are numbered from 0. Until ``plan_memory`` a platform does not know what they are, and answers only what is
    asked before that.
    """

    # ---- before SGLang is imported, in main

    @property
    def rules(self) -> DeviceRules:
        """What flags may say about the device."""

    def defaults(self, given: Mapping[str, object], environ: Mapping[str, str], tp_size: int) -> Defaults:
        """Work out what SGLang must be told. What is in ``given`` (by ServerArgs field) or ``environ`` stays.

        Changes nothing. Raises ValueError for the operator.
        """

    # ---- the plan of a server

    def plan_memory(
        self, model: ModelAxes, ownership: Ownership, view: Any, options: AnchorOptions, spreads_experts: bool
    ) -> MemoryPlan:
        """Decide what each device is, how many KV slots there are, and whether there is a mirror of them.

        ``view``: SGLang's resolved arguments. ``spreads_experts``: experts are dealt by counts. Raises ValueError for
        what does not fit or is not supported.
        """

    @property
    def identity(self) -> tuple[str, ...]:
        """Names the devices: anchors of a server with others must not be taken over."""

    @property
    def rank_overrides(self) -> Mapping[str, Any]:
        """ServerArgs that ranks start with, whatever the operator asks for."""

    def graph_batch_sizes(self, view: Any) -> tuple[int, ...]:
        """Batch sizes for which ranks shall capture decode graphs; none if they stay eager. ``view``: as above."""

    # ---- memory

    def arena(self, device: int) -> ArenaSpec:
        """The arena that the device's anchor makes. (The host anchor's is HOST_MEMORY everywhere.)"""

    @property
    def maps_parts(self) -> bool:
        """Whether pages of several segments can be mapped as one: then a shard's bytes stay where they are when it
        changes. Else segments are mapped whole, and a shard that changes is copied."""

    @property
    def lazy_memory(self) -> bool:
        """Whether memory is taken page by page when it is touched first. Else a model must be built without any, as a
        skeleton."""

    @property
    def new_memory_is_zero(self) -> bool:
        """Whether a new segment holds zeros. Else padding and KV are zeroed before they are read."""

    @property
    def in_host_memory(self) -> bool:
        """Whether host code reads a rank's tensors in place (``tensor.numpy()``)."""

    @property
    def moves_kv(self) -> bool:
        """Whether KV can be copied between devices and from the mirror. Else it stays in place, or goes when the heads
        that a device holds change."""

    # ---- inside a rank

    def byte_tensor(self, device: int, parts: Sequence[Part]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Map parts of segments of any device one after the other, for use by a rank on ``device``.

        Returns a tensor of their bytes (uint8) and what ends the mapping, to be called when the tensor is no longer
        used. Unless ``maps_parts`` it takes one part, a whole segment. Raises OSError or ArenaError.
        """

    def mover(self, device: int, open_writer: Callable[[], Write]) -> Mover:
        """Make a mover that fills a shard on ``device``. ``open_writer``: opens a way past the mapping of the shard, if
        the mover wants it."""

    def gpu_id(self, device: int, rank: int) -> int:
        """The ordinal that SGLang gets for a rank on ``device``. To be asked before SGLang touches the device."""

    def make_collectives(self, buffer: object, rank: int, world_size: int, on_progress: Callable[[], None]) -> Any:
        """Make what takes the place of SGLang's collectives, in the scheduler's thread, before process groups are made.

        Returns what the attachment holds for the platform's hooks; None where SGLang's stay. ``buffer``:
        ``collectives_bytes(world_size)`` of shared memory, zeroed. ``on_progress``: called in each of them.
        """

    def collectives_bytes(self, world_size: int) -> int:
        """Bytes of host memory that the collectives of a generation share."""

    def wait_for_forward(self) -> None:
        """Wait until the forward pass that has returned is complete on this rank's device. Called in every step."""

    # ---- recovery, in main

    @property
    def spares_join_early(self) -> bool:
        """Whether spare ranks may form the next generation's process group ahead of a fault."""

    def watch(self, on_fault: Callable[[str], None]) -> DeviceWatch:
        """Make what notices lost devices whose anchors live. ``on_fault``: called on the event loop, with a reason."""


class DeviceWatch(Protocol):
    """What main learns of its devices besides the deaths of processes."""

    @property
    def errors(self) -> Mapping[int, str]:
        """Device -> why it is lost, for good."""

    async def watch(self) -> None:
        """Follow the devices as long as the server runs; returns at once if there is nothing to follow."""

    async def probe(self) -> None:
        """Ask each device whether it still answers, and note those that do not. Reports no fault."""


@dataclass(frozen=True)
class MemoryPlan:
    """What ``plan_memory`` has decided. ``platform``: the same one, which now knows what each device is.

    ``kv``: the most slots that any generation has. ``mirror``: None without one; ``mirror_said``: why, or how large.
    """

    platform: Platform
    kv: KVPlan
    mirror: MirrorPlan | None
    mirror_said: str


@dataclass(frozen=True)
class Defaults:
    """Additions only: ``env`` for os.environ, before SGLang is imported; ``flags`` by ServerArgs field."""

    env: dict[str, str]
    flags: dict[str, object]
    title: str


def describe(defaults: Defaults) -> str:
    """Say in one line for the log what was set, as a user would have written it."""
    env = [f"{name}={value}" for name, value in defaults.env.items()]
    flags = [_as_option(name, value) for name, value in defaults.flags.items()]
    return f"{defaults.title}: " + (" ".join(env + flags) or "nothing, all of it was given")


def _as_option(name: str, value: object) -> str:
    option = "--" + name.replace("_", "-")
    return option if value is True else f"{option} {value}"
