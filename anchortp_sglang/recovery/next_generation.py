"""Finds the next generation after a fault: the verdict on each device, the next ownership, and its processes."""

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from anchortp_sglang import start_log
from anchortp_sglang.anchor.client import AnchorRefused
from anchortp_sglang.anchor.launch import AnchorStartError
from anchortp_sglang.kv.chain_hash import RunHasher, root_hash
from anchortp_sglang.kv.namespaces import Key, namespace_seed
from anchortp_sglang.option_values import AVAILABLE, StartDevices
from anchortp_sglang.planning.layout.extents import WeightPlacement
from anchortp_sglang.planning.ownership.ownership import InvalidOwnership, Ownership, split
from anchortp_sglang.planning.placement.expert_load import spread_hot_experts
from anchortp_sglang.planning.placement.reconfiguration import reconfigure, rotating_split
from anchortp_sglang.rank.attachment import HOST_DEVICE
from anchortp_sglang.recovery import state_machine
from anchortp_sglang.recovery.processes.generation import Generation, wait_dead
from anchortp_sglang.recovery.processes.server_plan import ServerPlan
from anchortp_sglang.recovery.processes.server_processes import ServerProcesses
from anchortp_sglang.recovery.processes.target import Target, target_of

log = logging.getLogger(__name__)

_NO_MEMORY_PAUSE_S = 0.5


class Unrecoverable(RuntimeError):
    """No new generation is possible; the text says why."""


class NextGeneration:
    """Finds and makes the next generation. Its methods block, except for ``judge`` and ``plan``.

    ``number``: of the last generation made. ``held``: the complete weights that the anchors hold. ``kv_valid``: whether
    the KV and the slot table of their ownership can be taken over. ``widths``: of ``--anchor-widths``, by device.
    ``target``: where a planned change leads, from the moment that serving ranks are stopped for it until the attempt to
    start it. ``not_started``: why devices could not be started with the server, by device.
    """

    def __init__(
        self,
        processes: ServerProcesses,
        configured: Ownership,
        min_devices: int,
        widths: Mapping[int, int] | None = None,
    ) -> None:
        self.number = 0
        self.not_started: dict[int, str] = {}
        self.held: WeightPlacement | None = None
        self.kv_valid = False
        self.target: Target | None = None
        self._leaving: tuple[int, ...] = ()
        self._joining: tuple[int, ...] = ()
        self._planned: WeightPlacement | None = None
        self._processes = processes
        self._configured = configured
        self._min_devices = min_devices
        self._widths = widths

    def first(self, devices: StartDevices = None) -> Generation:
        """Start anchors and ranks of the configured ownership, or of some of its devices. Does not wait for the ranks.

        Raises InvalidOwnership, AnchorStartError.
        """
        anchors, plan = self._processes.anchors, self._processes.plan
        ownership = self._of(self._configured.devices if devices is None or devices == AVAILABLE else devices)
        weights = plan.hold(ownership, None)
        taken = anchors.take_over(weights)
        if taken is not None:
            self.number, self.held, self.kv_valid = taken + 1, weights, True
        if devices == AVAILABLE:
            ownership = self._of(self._start_available(ownership.devices))
            weights = plan.hold(ownership, None)
        else:
            anchors.start(ownership.devices)
        anchors.fence(self.number, ownership.devices)
        anchors.allocate(self.number, weights)
        start_log.step("anchors hold their memory")
        return self._processes.start_ranks(self.number, weights, self.held, self.kv_valid)

    def _of(self, devices: Sequence[int]) -> Ownership:
        """Share the model out to some of the configured devices."""
        plan = self._processes.plan
        if tuple(devices) == self._configured.devices:
            return self._configured
        return rotating_split(plan.model, devices) if plan.rotate_heads else split(plan.model, devices)

    def _start_available(self, devices: Sequence[int]) -> list[int]:
        """Start anchors of as many devices as can be started; return these. Raises AnchorStartError if too few can."""
        anchors = self._processes.anchors
        anchors.start(())  # the host's: nothing works without it
        for device in devices:
            try:
                anchors.start((device,))
            except (AnchorStartError, OSError) as error:
                log.warning("anchortp: device %d is left out: %s", device, error)
                self.not_started[device] = str(error).strip().splitlines()[-1]
        started = [device for device in devices if device not in self.not_started]
        if len(started) < self._min_devices:
            reasons = "; ".join(f"device {device}: {reason}" for device, reason in self.not_started.items())
            raise AnchorStartError(
                f"{len(started)} devices could be started, --anchor-min-devices is {self._min_devices}: {reasons}"
            )
        return started

    def judge(self, generation: Generation, device_errors: Mapping[int, str], reason: str) -> state_machine.Verdict:
        """Judge what of a generation has failed, once its ranks are dead."""
        assert self.held is not None
        serving = generation.ownership.devices
        died, hung = ({serving[rank] for rank in ranks} for ranks in (generation.died, generation.hung))
        evidence = [
            state_machine.DeviceEvidence(
                device=device,
                anchor_alive=self._processes.anchors.alive(device),
                rank_died=device in died,
                rank_hung=device in hung,
                device_error=device_errors.get(device, ""),
            )
            for device in self.held.ownership.devices
        ]
        return state_machine.judge(evidence, reason, planned=self.target is not None)

    def target_for(
        self,
        devices: Collection[int],
        widths: Mapping[int, int] | None = None,
        shares: Mapping[int, int] | None = None,
    ) -> Target:
        """Plan a change to ``devices``. Raises InvalidOwnership, with what is not possible.

        ``widths``: KV heads of each device. ``shares``: its units of the coarsest axis, instead. Without either, shares
        are as equal as possible, or, where devices join, as ``--anchor-widths`` says.
        """
        assert self.held is not None
        plan, held = self._processes.plan, self.held
        if widths is not None:
            _check_widths(plan, devices, widths)
        elif shares is not None:
            widths = shares
        elif self._widths is not None and set(devices) - set(held.ownership.devices):
            widths = self._widths
        if len(devices) < self._min_devices:
            raise InvalidOwnership(f"{len(devices)} devices are fewer than --anchor-min-devices {self._min_devices}")
        ownership = _reconfigured(plan, held.ownership, tuple(devices), widths)
        plan.kv_of(ownership)
        return target_of(held.ownership, plan.hold(ownership, held))

    def plan(self, lost: Collection[int]) -> Ownership:
        """Plan the next ownership, and increment ``number``. Raises Unrecoverable.

        A planned change is tried once, and not if a device was lost: whatever goes wrong with it, the devices that are
        left go on as they were.
        """
        assert self.held is not None
        plan, held = self._processes.plan, self.held.ownership
        target, self.target, self._leaving, self._joining, self._planned = self.target, None, (), (), None
        if not self._processes.anchors.alive(HOST_DEVICE):
            self.kv_valid = False  # the contents of the slots are no longer known
        survivors = [device for device in held.devices if device not in lost]
        if len(survivors) < self._min_devices:
            raise Unrecoverable(
                f"{len(survivors)} of {self._configured.tp_size} devices are left, "
                f"--anchor-min-devices is {self._min_devices}"
            )
        if lost:
            ownership = _after_loss(plan, held, survivors)
        elif target is not None:
            ownership, self._leaving, self._planned = target.ownership, target.leaving, target.weights
            if self._processes.anchors.planned is not target:  # nothing was built ahead
                self._joining = target.joining
        else:
            ownership = held
        if ownership != held and not plan.platform.moves_kv:
            self.kv_valid = False
        self.number += 1
        return ownership

    def running_hashes(self, ownership: Ownership, open_tokens: Iterable[tuple[Key, NDArray[np.int64]]]) -> bytes:
        """Return chain hashes (uint64) of open requests' tokens: their KV is retained first if there is less room.

        ``open_tokens``: each request's extra key and cache salt, and its tokens (int64[n]); not read if all KV fits.
        """
        assert self.held is not None
        plan = self._processes.plan
        if plan.kv_of(ownership).slots >= plan.kv_of(self.held.ownership).slots:
            return b""
        hasher, root = RunHasher(), root_hash(plan.namespace)
        return b"".join(hasher.run_hashes(namespace_seed(root, key), tokens).tobytes() for key, tokens in open_tokens)

    def fork(self, ownership: Ownership, running: bytes, old: Generation) -> Generation:
        """Start the planned generation: the standby, if one fits, or else ranks forked now.

        ``running``: from ``running_hashes``. ``old``: the last generation, whose ranks are dead or have left.
        """
        assert self.held is not None
        anchors, plan = self._processes.anchors, self._processes.plan
        if not anchors.alive(HOST_DEVICE):
            anchors.start_one(HOST_DEVICE, self.number)
        for device in self._joining:
            if not anchors.alive(device):
                anchors.start_one(device, self.number)
        anchors.fence(self.number, (*ownership.devices, *self._leaving))
        weights = self._planned or plan.hold(ownership, self.held)
        if self.kv_valid:
            standby = self._processes.run_standby(self.number, weights, self._leaving, running)
            if standby is not None:
                return standby
        if old.left:  # what is forked now needs the memory and the processors
            old.left = False
            old.kill()
            wait_dead(old)
        self._processes.standbys.put_aside(self.number)
        anchors.free_unneeded(self.number, self.held, weights, self.kv_valid)
        try:
            anchors.allocate(self.number, weights)
        except AnchorRefused as refusal:
            if refusal.code == "no_memory":
                self._processes.standbys.end_useless()  # it holds memory that a lost device held
                time.sleep(_NO_MEMORY_PAUSE_S)  # it is requested again, until the deadline
            raise
        return self._processes.start_ranks(
            self.number, weights, self.held, self.kv_valid, running, leaving=self._leaving
        )

    def on_generation_ready(self, generation: Generation) -> None:
        """Note that all ranks are ready: their weights are complete, their KV and slot table are in use."""
        self.held, self.kv_valid = generation.weights, True


def _after_loss(plan: ServerPlan, held: Ownership, survivors: Sequence[int]) -> Ownership:
    try:
        ownership = _reconfigured(plan, held, survivors)
        plan.kv_of(ownership)
        return ownership
    except InvalidOwnership as error:
        raise Unrecoverable(str(error)) from error


def _check_widths(plan: ServerPlan, devices: Collection[int], widths: Mapping[int, int]) -> None:
    heads, given = plan.model.num_kv_heads, ",".join(str(widths[device]) for device in sorted(devices))
    if plan.rotate_heads:
        raise InvalidOwnership("widths are not possible with --anchor-rotate-heads")
    if sum(widths[device] for device in devices) != heads:
        raise InvalidOwnership(f"widths {given} do not add up to the {heads} KV heads of the model")


def _reconfigured(
    plan: ServerPlan, held: Ownership, devices: Sequence[int], widths: Mapping[int, int] | None = None
) -> Ownership:
    ownership = reconfigure(plan.model, held, devices, plan.rotate_heads, widths)
    if plan.expert_counts is None or ownership == held:
        return ownership
    return spread_hot_experts(plan.model, ownership, plan.expert_counts, held)
