"""What forked children do in test_recovery_spares."""

import time

import torch
import torch.distributed as dist

from anchortp_sglang.rank.spare import rendezvous


def all_reduce(place, pipe):
    """Sends the sum of a one from each rank, and whether its group was there before."""
    rank, world_size, port = place
    rendezvous(port)
    before = dist.is_initialized()
    if not before:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    ones = torch.ones(1)
    dist.all_reduce(ones)
    pipe.send((int(ones), "joined before" if before else "joined now"))
    time.sleep(60)
