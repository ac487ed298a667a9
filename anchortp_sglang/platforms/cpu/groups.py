"""Shares process groups between SGLang's coordinators on the CPU: each one costs the start a round of all ranks.

SGLang makes two for each list of ranks of each kind of parallelism: at TP=4 some 36, one after the other, each ending
in a barrier of all ranks over the TCPStore. But only two lists ever differ: all ranks, and each rank alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.rank.attachment import current

_BACKEND = "gloo"


class Groups:
    """Replaces ``torch.distributed.new_group`` while group coordinators are built.

    All ranks: the default group, which torch has made already. One rank: a group of its own. All coordinators share
    them: one thread of a scheduler uses them, in the same order on all ranks.
    """

    def __init__(self, new_group: Callable[..., Any]) -> None:
        self._new_group = new_group
        self._alone: Any = None

    def __call__(self, ranks: Sequence[int], backend: str, **more: Any) -> Any:
        world = dist.group.WORLD
        if backend != _BACKEND or dist.get_backend(world) != _BACKEND:
            return self._new_group(ranks, backend=backend, **more)
        if len(ranks) == dist.get_world_size():
            return world
        if len(ranks) > 1:
            return self._new_group(ranks, backend=backend, **more)
        if list(ranks) != [dist.get_rank()]:
            return dist.GroupMember.NON_GROUP_MEMBER
        if self._alone is None:
            self._alone = self._new_group(ranks, backend=backend, use_local_synchronization=True)
        return self._alone


def around_group_coordinator_init(original: Callable[..., None], coordinator: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND GroupCoordinator.__init__, which calls torch.distributed.new_group by that name."""
    attachment = current()
    if attachment is None or not isinstance(attachment.assignment.platform, CpuPlatform):
        return original(coordinator, *args, **kwargs)
    stock = dist.new_group
    attachment.groups = attachment.groups or Groups(stock)
    dist.new_group = attachment.groups
    try:
        original(coordinator, *args, **kwargs)
    finally:
        dist.new_group = stock


HOOKS: tuple[tuple[str, str, Callable[..., Any], str], ...] = (
    (
        "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__",
        "around",
        around_group_coordinator_init,
        "on CPU coordinators share their process groups, of which it makes dozens",
    ),
)
"""Target, kind, hook, reason."""
