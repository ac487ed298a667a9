"""The interface between the rest and a platform, which ``platforms/cpu`` and ``platforms/cuda`` implement.

A server's platform is chosen once, before SGLang is imported (``startup.device.choose_platform``). The server plan and
each rank's assignment carry it, pickled. Nothing outside ``platforms/`` asks which one it is: every difference is a
question of ``Platform``. Imports neither SGLang nor torch; of an implementation only modules that ranks alone need may
import them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from anchortp_sglang.admission.devices import DeviceRules
from anchortp_sglang.memory.arena import Part
from anchortp_sglang.memory.arena_kinds import ArenaSpec
from anchortp_sglang.options import AnchorOptions, StandbyMode
from anchortp_sglang.planning.layout.kv_layout import KVPlan, MirrorPlan
from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.ownership.ownership import Ownership

if TYPE_CHECKING:
    import torch

    from anchortp_sglang.platforms.mover import Mover, Write

__all__ = ["Defaults", "DeviceWatch", "MemoryPlan", "Platform", "describe"]


class Platform(Protocol):
    """One kind of device. Implementations are frozen, small, equal if their fields are, and can be pickled.

    Devices are numbered from 0. A platform learns what they are in ``plan_memory``; before that it answers only what is
    needed earlier.
    """

    # ---- before SGLang is imported, in main

    @property
    def rules(self) -> DeviceRules:
        """Rules for flags that concern the device."""

    def defaults(self, given: Mapping[str, object], environ: Mapping[str, str], tp_size: int) -> Defaults:
        """Work out the settings that SGLang needs. Values in ``given`` (by ServerArgs field) or ``environ`` stay.

        Changes nothing. Raises ValueError for the operator.
        """

    # ---- the plan of a server

    def plan_memory(
        self,
        model: ModelAxes,
        ownership: Ownership,
        view: Any,
        options: AnchorOptions,
        spreads_experts: bool,
        adapter_bytes: int,
    ) -> MemoryPlan:
        """Decide what each device is, the number of KV slots, whether there is a mirror, and what stands by.

        ``view``: SGLang's resolved arguments. ``spreads_experts``: experts are dealt by counts. ``adapter_bytes``: what
        LoRA adapters and their buffers take. Raises ValueError for a plan that does not fit or is not supported.
        """

    @property
    def identity(self) -> tuple[str, ...]:
        """Names of the devices: anchors of a server with other devices must not be taken over."""

    @property
    def rank_overrides(self) -> Mapping[str, Any]:
        """ServerArgs that ranks start with, whatever the operator asks for."""

    def graph_batch_sizes(self, view: Any) -> tuple[int, ...]:
        """Return the batch sizes for which ranks capture decode graphs; none if they stay eager. ``view``: as above."""

    # ---- memory

    def arena(self, device: int) -> ArenaSpec:
        """Return the arena that the device's anchor makes. (The host anchor's is HOST_MEMORY everywhere.)"""

    @property
    def maps_parts(self) -> bool:
        """Whether pages of several segments can be mapped as one.

        If so, a shard's bytes stay in place when it changes. Else segments are mapped whole, and a changed shard is
        copied.
        """

    @property
    def lazy_memory(self) -> bool:
        """Whether memory is taken page by page when first touched. Else a model is built as a skeleton."""

    @property
    def new_memory_is_zero(self) -> bool:
        """Whether a new segment holds zeros. Else padding and KV are zeroed before they are read."""

    @property
    def moves_kv(self) -> bool:
        """Whether KV can be copied between devices and from the mirror.

        Else it stays in place, and is dropped when the heads that a device holds change.
        """

    # ---- inside a rank

    def byte_tensor(self, device: int, parts: Sequence[Part]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Map parts of segments of any device one after the other, for use by a rank on ``device``.

        Returns a tensor of their bytes (uint8) and a function that ends the mapping, to be called when the tensor is no
        longer used. Unless ``maps_parts`` it takes one part, a whole segment. Raises OSError or ArenaError.
        """

    def mover(self, device: int, open_writer: Callable[[], Write]) -> Mover:
        """Make a mover that fills a shard on ``device``.

        ``open_writer`` opens a way to write past the mapping of the shard, which the mover may use.
        """

    def gpu_id(self, device: int, rank: int) -> int:
        """Return the ordinal that SGLang gets for a rank on ``device``. Call it before SGLang touches the device."""

    def make_collectives(self, buffer: object, rank: int, world_size: int, on_progress: Callable[[], None]) -> Any:
        """Make replacements for SGLang's collectives; in the scheduler's thread, before process groups are made.

        Returns what the attachment holds for the platform's hooks; None where SGLang's stay. ``buffer``:
        ``collectives_bytes(world_size)`` of shared memory, zeroed. ``on_progress`` is called in each collective.
        """

    def collectives_bytes(self, world_size: int) -> int:
        """Return the bytes of host memory that the collectives of a generation share."""

    def wait_for_forward(self) -> None:
        """Wait until the forward pass that has returned is complete on this rank's device.

        Called in every step, except with the overlap schedule, whose results come with an event of their own.
        """

    def free_bytes(self, device: int) -> int:
        """Return the free memory of the device that this rank is on; 0 where devices share the host's."""

    # ---- recovery, in main

    @property
    def spares_join_early(self) -> bool:
        """Whether spare ranks may form the next generation's process group ahead of a fault."""

    def watch(self, on_fault: Callable[[str], None]) -> DeviceWatch:
        """Make a watch for lost devices whose anchors live. ``on_fault`` is called on the event loop, with a reason."""


class DeviceWatch(Protocol):
    """Main's watch over its devices, for faults besides the deaths of processes."""

    @property
    def errors(self) -> Mapping[int, str]:
        """Reasons of devices that are lost, by device."""

    async def watch(self) -> None:
        """Follow the devices as long as the server runs; return at once if there is nothing to follow."""

    async def recheck(self, device: int) -> str:
        """Probe a lost device anew. Return why it is still lost; or an empty text, and count it as well from now on."""

    async def probe(self) -> None:
        """Ask each device whether it still answers, and note those that do not. Reports no fault."""


@dataclass(frozen=True)
class MemoryPlan:
    """The result of ``plan_memory``. ``platform``: the same one, which now knows what each device is.

    ``kv``: the most slots that any generation has. ``mirror``: None without one; ``mirror_text``: why, or how large.
    ``standby``: what waits for the next fault; ``standby_text``: the same for the log, and why. ``min_devices``: the
    fewest that a generation can have.
    """

    platform: Platform
    kv: KVPlan
    mirror: MirrorPlan | None
    mirror_text: str
    standby: StandbyMode
    standby_text: str
    min_devices: int = 1


@dataclass(frozen=True)
class Defaults:
    """Settings to add: ``env`` for os.environ, before SGLang is imported; ``flags`` by ServerArgs field."""

    env: dict[str, str]
    flags: dict[str, object]
    title: str


def describe(defaults: Defaults) -> str:
    """Describe in one line for the log what was set, as a user would have written it."""
    env = [f"{name}={value}" for name, value in defaults.env.items() if not name.startswith("ANCHORTP_")]
    flags = [_as_option(name, value) for name, value in defaults.flags.items()]
    return f"{defaults.title}: " + (" ".join(env + flags) or "nothing, as you have set all of it")


def _as_option(name: str, value: object) -> str:
    option = "--" + name.replace("_", "-")
    return option if value is True else f"{option} {value}"
