"""Times what a standby costs while nothing fails, and while it is built again after a kill: two servers in turns.

    PYTHONPATH=. $(make -s print-python) tools/time_standing.py [--beside off|cold] [--turns 40] [--kills 8]

One server has a warm standby, the other has none, or spare ranks. Both are asked batches of 8 prompts in turns: tokens
per second, as ratios of neighbouring turns, and the processor time of the standby's processes; then their memory. Then
ranks of the first one are killed in the middle of 8 streams: tokens per second from the first new ones until the next
standby is ready, as a share of those after that.
"""

import argparse
import itertools
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from anchortp_sglang.bench.load import Load
from anchortp_sglang.bench.model_sizes import VOCAB_SIZE, ModelSize, make_model
from anchortp_sglang.testing.memory import total_bytes
from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.streams import Streams

FLAGS = ("--device", "cpu", "--dtype", "float32", "--anchor-allow-injection", "--anchor-standby")
STREAMS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--beside", default="off", choices=("off", "cold"), help="the standby of the other server")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=60, help="of each request of a turn")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped then, too
    with tempfile.TemporaryDirectory(prefix="anchortp-time-") as folder:
        model, servers = make_model(Path(folder) / "model", ModelSize.TINY), {}
        try:
            for standby in ("warm", options.beside):
                flags = (*FLAGS, standby, "--max-total-tokens", str(options.slots))
                servers[standby] = Server(model, options.tp, *flags, log=Path(folder) / standby)
                servers[standby].start()
            wait_ready(servers["warm"])
            measure_turns(servers, options.turns, options.tokens)
            measure_memory(servers)
            servers[options.beside].stop()
            measure_renewal(servers["warm"], options.kills, options.tp)
        finally:
            for server in servers.values():
                server.stop()


def measure_memory(servers: dict[str, Server]) -> None:
    warm, other = (total_bytes([server.pid, *(c.pid for c in children(server))]) for server in servers.values())
    print(f"memory: {warm >> 20} MiB with a warm standby, {other >> 20} otherwise: {warm / other - 1:+.1%}", flush=True)


def measure_turns(servers: dict[str, Server], turns: int, tokens: int) -> None:
    requests = Load(1.0, STREAMS, VOCAB_SIZE).requests()
    rates: dict[str, list[float]] = {name: [] for name in servers}
    shares = []
    for turn in range(turns + 2):
        for name in list(servers)[:: 1 if turn % 2 else -1]:
            server = servers[name]
            for request in requests:
                request["sampling_params"]["max_new_tokens"] = tokens
            began, busy = time.monotonic(), standby_cpu_s(servers["warm"])
            with Streams(server.url, requests) as streams:
                pass
            if turn > 1:
                rates[name].append(steady_rate(streams))
                shares.append((standby_cpu_s(servers["warm"]) - busy) / (time.monotonic() - began))
            server.flush_cache()
    ratios = [warm / other for warm, other in zip(*rates.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"decode with a warm standby {statistics.median(ratios):.1%} of the other (median of {turns} turns, half of "
        f"them from {low:.1%} to {high:.1%}); its processes take {statistics.fmean(shares):.2%} of a core",
        flush=True,
    )


def measure_renewal(server: Server, kills: int, tp: int) -> None:
    shares, built = [], []
    for number in range(kills):
        requests = Load(1.0, STREAMS, VOCAB_SIZE).requests()
        for request in requests:
            request["sampling_params"]["max_new_tokens"] = 1000
        with Streams(server.url, requests) as streams:
            streams.wait_tokens(30)
            generation = server.status()["generation"]
            server.inject(number % tp, "process")
            server.wait_serving(generation + 1)
            began = time.monotonic()
            wait_ready(server)
            ready = time.monotonic()
            streams.wait_tokens(100 + max(len(history.output_ids) for history in streams.histories))
            end = time.monotonic()
        shares.append(rate(streams, began + 0.3, ready) / rate(streams, ready, end))
        built.append(ready - began)
    print(
        f"while a standby is built again, in {statistics.median(built):.2f} s: {statistics.median(shares):.1%} of the "
        f"tokens per second after that (median of {kills} kills, {min(shares):.1%} to {max(shares):.1%})",
        flush=True,
    )


def wait_ready(server: Server) -> None:
    while server.status()["standby"] != "ready":
        time.sleep(0.1)


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def standby_cpu_s(server: Server) -> float:
    """CPU seconds so far of the standby's ranks."""
    its = [child for child in children(server) if "anchortp::standby" in " ".join(child.cmdline())]
    assert its, "there is no standby"
    return sum(sum(child.cpu_times()[:2]) for child in its)


def steady_rate(streams: Streams) -> float:
    """Tokens per second from when all streams have begun until the first one ends."""
    begin = max(history.arrivals[0][0] for history in streams.histories)
    return rate(streams, begin, min(history.arrivals[-1][0] for history in streams.histories))


def rate(streams: Streams, begin: float, end: float) -> float:
    got = 0
    for history in streams.histories:
        counts = [tokens for at, tokens in history.arrivals if begin <= at <= end]
        got += sum(after - before for before, after in itertools.pairwise(counts))
    return got / (end - begin)


if __name__ == "__main__":
    main()
