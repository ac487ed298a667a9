"""Times what a planned change of devices costs clients: one is drained and taken back, again and again, under load.

    PYTHONPATH=. $(make -s print-python) tools/time_change.py [--tp 4] [--rounds 5] [--size tiny] [--standby warm]

For each change: seconds from the request to the answer; the clients' longest pause when the new generation took over
(median over the streams); and the tokens per second while it was built, as a share of those before. Tokens are compared
with those of the same requests when nothing changes.
"""

import argparse
import itertools
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from anchortp_sglang.bench.load import Load
from anchortp_sglang.bench.model_sizes import VOCAB_SIZE, ModelSize, make_model
from anchortp_sglang.cli.client import reconfigure
from anchortp_sglang.testing.memory import touch
from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.streams import Streams

FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384")
TOOK_OVER_S = 1.0
"""Within how long of the answer the new generation has taken over."""
SETTLE_S = 6.0
"""Pause before a change: spare ranks and the standby are there again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="drains, each followed by a rejoin")
    parser.add_argument("--size", type=ModelSize, default=ModelSize.TINY, choices=list(ModelSize))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600, help="of each stream")
    parser.add_argument("--standby", default="warm", choices=("warm", "cold"))
    parser.add_argument("--touch-gib", type=float, default=0.0, help="of free memory before each change (memory.touch)")
    parser.add_argument("--log", help="keep the server's log here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped then, too
    with tempfile.TemporaryDirectory(prefix="anchortp-time-") as folder:
        model = make_model(Path(folder) / "model", options.size)
        log = Path(options.log or Path(folder) / "log")
        server = Server(model, options.tp, *FLAGS, "--anchor-standby", options.standby, log=log)
        with server:
            measure(server, options)


def measure(server, options) -> None:
    requests = Load(1.0, options.streams, VOCAB_SIZE).requests()
    for request in requests:
        request["sampling_params"]["max_new_tokens"] = options.tokens
    with Streams(server.url, requests) as streams:
        pass
    expected = [history.output_ids for history in streams.histories]
    found = {"drain": [], "rejoin": []}
    for number in range(options.rounds):
        for kind in found:
            time.sleep(SETTLE_S)
            touch(options.touch_gib)
            change = {kind: [number % options.tp]}
            with Streams(server.url, requests) as streams:
                streams.wait_tokens(60)
                began = time.monotonic()
                answer = reconfigure(server.url, change)
                took = time.monotonic() - began
            assert all(history.error is None for history in streams.histories), streams.histories
            assert [history.output_ids for history in streams.histories] == expected, "tokens differ"
            record = server.status()["recoveries"][-1]
            pauses = [pause_around(history, began + took) for history in streams.histories]
            pause = statistics.median(length for length, _ in pauses)
            built_at = statistics.median(at for _, at in pauses)
            share = rate(streams, began, built_at) / rate(streams, began - 1.0, began)
            found[kind].append((took, pause, share, record["tfs_s"] or 0.0))
            print(
                f"{kind} {number % options.tp}: {took:.2f} s, pause {pause:.3f} s, TFS {record['tfs_s']} s, "
                f"tokens/s while it is built {share:.2f}; kept {record['kv']['kept_bytes'] >> 20} MiB of KV, "
                f"moved {mib(answer['plan']['moved_bytes'])} MiB, at least {mib(answer['plan']['least_bytes'])}",
                flush=True,
            )
    for kind, rows in found.items():
        took, pause, share, tfs = (statistics.median(column) for column in zip(*rows, strict=True))
        longest = max(row[1] for row in rows)
        pauses = f"pause {pause:.3f} s (longest {longest:.3f})"
        print(f"{kind}, medians: {took:.2f} s, {pauses}, TFS {tfs:.3f} s, tokens/s while it is built {share:.2f}")


def pause_around(history, answered_at: float) -> tuple[float, float]:
    """Return a stream's longest pause when the new generation took over, and its begin (monotonic, in seconds)."""
    times = [at for at, _ in history.arrivals]
    pauses = [(after - at, at) for at, after in itertools.pairwise(times)]
    return max(pause for pause in pauses if answered_at - TOOK_OVER_S < sum(pause) < answered_at + TOOK_OVER_S)


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f}"


def rate(streams, begin: float, end: float) -> float:
    """Tokens per second over all streams."""
    got = 0
    for history in streams.histories:
        counts = [tokens for at, tokens in history.arrivals if begin <= at <= end]
        got += counts[-1] - counts[0] if counts else 0
    return got / max(end - begin, 1e-9)


if __name__ == "__main__":
    main()
