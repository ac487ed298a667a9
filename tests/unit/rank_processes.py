"""Real rank processes for tests: forked, on one fresh shared region, killed whatever happens."""

import mmap
import multiprocessing
import os
import traceback

import torch

from anchortp_sglang.platforms.cpu.collectives import region_bytes

TIMEOUT_S = 60


def run_ranks(world_size, rank_main, *args):
    """Fork the ranks on one fresh region; returns what each one's ``rank_main(region, rank, *args)`` does."""
    region_fd = os.memfd_create("region")
    os.ftruncate(region_fd, region_bytes(world_size))
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_enter, args=(pipes[rank][1], region_fd, rank_main, rank, world_size, *args))
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        return [_result(reader) for reader, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
        os.close(region_fd)


def _enter(writer, region_fd, rank_main, rank, world_size, *args):
    torch.set_num_threads(1)
    try:
        region = mmap.mmap(region_fd, region_bytes(world_size))
        writer.send((rank_main(region, rank, world_size, *args), None))
    except BaseException:
        writer.send((None, traceback.format_exc()))


def _result(reader):
    assert reader.poll(TIMEOUT_S), f"a rank did not answer within {TIMEOUT_S} s"
    result, error = reader.recv()
    assert error is None, error
    return result
