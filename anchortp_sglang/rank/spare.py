"""Keeps a spare ready: a child that warms up and joins the others, until main assigns it a rank.

``rendezvous`` is also how a rank that was no spare finds the others of its generation.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from anchortp_sglang.rank.warmup import warm_up

log = logging.getLogger(__name__)

STORE_HOST = "127.0.0.1"
ARE_YOU_THERE = "are you there"


@dataclass(frozen=True)
class SpareSpec:
    """The rank that a spare would be, of how many, and where it meets the others.

    ``timeout_s``: of torch's process group; None for torch's default.
    """

    rank: int
    world_size: int
    store_port: int
    timeout_s: float | None


def stand_by(spec: SpareSpec | None, pipe: Connection) -> None:
    """Warm up, then wait until main assigns a role or closes the pipe. Sends None when ready for that."""
    try:
        warm_up()
    except Exception:  # whatever it is, it comes again in the rank if it matters, and is reported there
        log.exception("anchortp: the warm-up of a spare rank failed; it is used without")
    if spec is not None:
        _join(spec)
    target, argument = await_order(pipe)
    target(argument, pipe)


def await_order(pipe: Connection) -> Any:
    """Send None, and again each time that main asks whether this process is there; return what else it sends.

    Raises EOFError when main has closed the pipe.
    """
    pipe.send(None)
    while (order := pipe.recv()) == ARE_YOU_THERE:
        pipe.send(None)
    return order


def _join(spec: SpareSpec) -> None:
    """Join the group that SGLang would otherwise make (init_distributed_environment, distributed/parallel_state.py)."""
    _stay_on_loopback()
    timeout: dict[str, Any] = {} if spec.timeout_s is None else {"timeout": timedelta(seconds=spec.timeout_s)}
    store = dist.TCPStore(STORE_HOST, spec.store_port, is_master=False, wait_for_workers=False, **timeout)
    dist.init_process_group("gloo", store=store, rank=spec.rank, world_size=spec.world_size, **timeout)
    _name_store(spec.store_port)


def rendezvous(store_port: int) -> None:
    """Make SGLang meet the other ranks at this store, which main serves (torch: agent store).

    A spare that met them there stays in that group, and SGLang makes no other; it leaves any other group.
    """
    if dist.is_initialized() and os.environ.get("MASTER_PORT") != str(store_port):
        dist.destroy_process_group()
    _stay_on_loopback()
    _name_store(store_port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"tcp://{STORE_HOST}:{store_port}"


def _name_store(store_port: int) -> None:
    """Set torch's variables to where this process meets its group, or has met it."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = STORE_HOST, str(store_port)


def _stay_on_loopback() -> None:
    """Let Gloo and NCCL listen on loopback; by default they listen on the address of the host's name."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_SOCKET_IFNAME"] = "=lo"
