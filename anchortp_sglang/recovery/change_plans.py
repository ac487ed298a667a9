"""Plans what a server's devices are to be: from what somebody wishes to a target, or the reason why there is none."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.planning.layout.change import change_of
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership
from anchortp_sglang.planning.placement.reconfiguration import fewest_units
from anchortp_sglang.recovery.balance import FINE_UNITS, Aim, is_worth_it, load, measure, shares
from anchortp_sglang.recovery.next_generation import NextGeneration
from anchortp_sglang.recovery.processes.generation import Generation
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.target import Target
from anchortp_sglang.threads import in_thread

FAULT_FIRST = "a fault came first; the change was not made"


class ChangeRefused(RuntimeError):
    """A change that is not made. ``code``: the HTTP status; 409 where the same request may be right later."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Wish:
    """The devices that somebody wants to serve: ``devices``, or if that is None the serving ones with some changes.

    ``widths``: KV heads of each device, in the order of ids; None to leave that open. ``rebalance``: what their shares
    are to follow, as measured; None for shares as they are.
    """

    devices: frozenset[int] | None = None
    drain: frozenset[int] = frozenset()
    rejoin: frozenset[int] = frozenset()
    widths: tuple[int, ...] | None = None
    rebalance: Aim | None = None

    def after(self, serving: frozenset[int]) -> frozenset[int]:
        """Return the devices that are to serve after those that serve now."""
        return (serving - self.drain) | self.rejoin if self.devices is None else self.devices

    def away(self, configured: frozenset[int]) -> frozenset[int]:
        """Return the devices that are to stay away, even if they do not serve now."""
        return self.drain if self.devices is None else configured - self.devices


class Planner:
    """Plans changes of the generation that ``serving`` returns. ``send`` sends a message to its ranks.

    All methods raise ChangeRefused. Nothing that they do has an effect on requests.
    """

    def __init__(
        self,
        processes: ServerProcesses,
        next_generation: NextGeneration,
        serving: Callable[[], Generation | None],
        send: Callable[[Any], None],
    ) -> None:
        self._processes = processes
        self._next = next_generation
        self._serving = serving
        self._send = send

    async def devices(
        self, serving: Generation, wanted: frozenset[int], widths: Sequence[int] | None
    ) -> tuple[Target, dict[str, Any]]:
        """Plan a change to ``wanted``, and sum up what it moves. ``widths``: as in Wish."""
        return await self._plan(serving, wanted, _by_device(wanted, widths), None)

    async def rebalanced(self, serving: Generation, aim: Aim) -> tuple[Target | None, dict[str, Any]]:
        """Plan shares by what the devices were measured to bear; no target if that would change little.

        Raises ChangeRefused.
        """
        devices, plan = serving.ownership.devices, self._processes.plan
        wanted = frozenset(devices)
        weights = [sum(shard.sizes.values()) for shard in serving.weights.shards]
        kv = [plan.kv_layout(serving.ownership, rank).total_bytes for rank in range(len(devices))]
        try:
            held = [sum(both) for both in zip(weights, kv, strict=True)]
            found = await measure(serving, aim, held, self._send, lambda: self._serving() is serving)
        except TimeoutError as error:
            raise ChangeRefused(503, str(error)) from None
        if found is None:
            raise ChangeRefused(409, FAULT_FIRST)
        unit = "bytes_per_s" if aim == "speed" else "memory_bytes"
        shared = aim == "memory" and max(found.values()) == 1
        answer = {"measured": [{"id": device, unit: None if shared else found[device]} for device in devices]}
        plans = [await self._plan(serving, wanted, None, shares(found, fewest_units(plan.model, len(devices))))]
        with contextlib.suppress(ChangeRefused):  # a device may be left without a head
            plans.append(await self._plan(serving, wanted, None, shares(found, FINE_UNITS)))
        target, summary = min(plans, key=lambda each: load(each[0].weights, found))
        if not is_worth_it(serving.weights, target.weights, found):
            return None, answer
        return target, answer | {"plan": summary}

    async def _plan(
        self,
        serving: Generation,
        wanted: frozenset[int],
        widths: Mapping[int, int] | None,
        units: Mapping[int, int] | None,
    ) -> tuple[Target, dict[str, Any]]:
        """Plan a change, and sum up what it moves. Raises ChangeRefused."""
        plan = self._processes.plan

        def work() -> tuple[Target, dict[str, Any]]:
            target = self._next.target_for(wanted, widths, units)
            summary = change_of(plan.model, serving.weights, target.weights)
            slots = [plan.kv_of(each).slots for each in (serving.ownership, target.ownership)]
            return target, summary | {"kv_slots": slots}

        try:
            return await in_thread(work)
        except InvalidOwnership as error:
            raise ChangeRefused(400, str(error)) from None


def _by_device(devices: Collection[int], widths: Sequence[int] | None) -> dict[int, int] | None:
    if widths is None:
        return None
    if len(widths) != len(devices) or any(width < 1 for width in widths):
        raise ChangeRefused(400, f"give a width of at least 1 to each of {len(devices)} devices, not {list(widths)}")
    return dict(zip(sorted(devices), widths, strict=True))
