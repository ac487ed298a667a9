"""Where the kernel gives main no descriptors of other processes, as under Docker's seccomp profile, ranks do."""

import re

from faults import holders, kill, kill_rank, memfds_of, recovered, standing_by
from histories import assert_exactly_once, assert_identical, outcomes, prompt, request, until
from no_pidfd_getfd import is_filtered
from remains import ROOT

from anchortp_sglang.testing.streams import Streams

REQUESTS = [request(prompt(5000 + seed, 30), 300) for seed in range(2)]
PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/unit'}"}


def anchors(server):
    """The anchors' pids by device: 0, 1 and host."""
    files = server.place.folder.glob("**/anchor-*.json")
    return {file.stem.removeprefix("anchor-"): int(re.search(r'"pid": ?(\d+)', file.read_text())[1]) for file in files}


def test_anchors_that_die_alone_get_their_memory_from_their_ranks(launch):
    with launch(2, module="no_pidfd_getfd", env=PATHS) as server:
        assert is_filtered(server.pid)
        said = "pidfd_getfd: Operation not permitted: when an anchor dies alone, its rank is asked for the memory"
        assert said in server.log.read_text()
        with Streams(server.url, REQUESTS) as streams:
            expected = outcomes(streams.wait())
        standing_by(server, 0)
        with Streams(server.url, REQUESTS) as streams:
            streams.wait_tokens(10)
            for device, pid in anchors(server).items():
                memory = {inode: name for inode, name in memfds_of(pid).items() if "-standby" not in name}
                keeps = holders(memory).keys() - {pid}
                kill(pid)
                until(lambda device=device, pid=pid: anchors(server).get(device, pid) != pid, "no new anchor")
                until(
                    lambda device=device, memory=memory: memfds_of(anchors(server)[device]).items() >= memory.items(),
                    lambda device=device: f"the new anchor of {device} did not take back all segments",
                )
                assert holders(memory).keys() == keeps | {anchors(server)[device]}, "main kept a descriptor"
            fault = kill_rank(server, 1)
            recovered(server, fault, "process")
        assert_identical(expected, outcomes(streams.histories))
        for history in streams.histories:
            assert_exactly_once(history)
        assert fault.generation == 0, "the death of an anchor alone was a fault"
        record = server.status()["recoveries"][-1]
        assert record["requests_replayed"] == len(REQUESTS)
        assert record["tokens_reused"] > record["tokens_recomputed"] > 0
        assert record["reload_bytes"] == 0
