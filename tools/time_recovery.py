"""Where the time of a recovery goes: medians of every stage over some kills of a rank of a small server under load.

    PYTHONPATH=. $(make -s print-python) tools/time_recovery.py [--tp 4] [--kills 10] [--device-loss] [--size tiny]

With --device-loss the server is started anew for each fault. Stages are those of the status: the server's own, each
from the end of the one before, and for the ranks the slowest one's.
"""

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from anchortp_sglang.bench.load import Load
from anchortp_sglang.bench.model_sizes import VOCAB_SIZE, ModelSize, make_model
from anchortp_sglang.bench.recovery_stats import percentile
from anchortp_sglang.recovery.report import stages
from anchortp_sglang.testing.memory import touch
from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.streams import Streams

FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384", "--anchor-allow-injection")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--device-loss", action="store_true")
    parser.add_argument("--size", type=ModelSize, default=ModelSize.TINY, choices=list(ModelSize))
    parser.add_argument("--overlap", action="store_true", help="use SGLang's overlap schedule")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=120, help="of each stream")
    parser.add_argument("--touch-gib", type=float, default=0.0, help="of free memory before each fault (memory.touch)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped then, too
    with tempfile.TemporaryDirectory(prefix="anchortp-time-") as folder:
        model = make_model(Path(folder) / "model", options.size)
        records, pauses, starts = [], [], []
        if options.device_loss:
            for number in range(options.kills):
                with_server(model, options, folder, [("device", number % options.tp)], records, pauses, starts)
        else:
            faults = [("process", number % options.tp) for number in range(options.kills)]
            with_server(model, options, folder, faults, records, pauses, starts)
    show(records, pauses, starts)


def with_server(model, options, folder, faults, records, pauses, starts) -> None:
    overlap = "on" if options.overlap else "off"
    server = Server(model, options.tp, *FLAGS, "--anchor-overlap", overlap, log=Path(folder) / "log")
    try:
        starts.append(server.start())
        for kind, device in faults:
            time.sleep(2.5)  # spare ranks are forked a second after a recovery
            requests = Load(1.0, options.streams, VOCAB_SIZE).requests()
            for request in requests:
                request["sampling_params"]["max_new_tokens"] = options.tokens
            with Streams(server.url, requests) as streams:
                touch(options.touch_gib)
                streams.wait_tokens(min(30, options.tokens // 2))
                generation = server.status()["generation"]
                server.inject(device, kind)
                server.wait_serving(generation + 1)
            assert all(history.error is None for history in streams.histories)
            records.append(server.status()["recoveries"][-1])
            pauses.append(statistics.median(history.longest_pause_s() for history in streams.histories))
            print(f"{kind} {device}: TFS {records[-1]['tfs_s']:.3f} s, pause {pauses[-1]:.3f} s", flush=True)
    finally:
        server.stop()


def show(records, pauses, starts) -> None:
    took = defaultdict(list)
    for record in records:
        server, *ranks = stages.rows(record)
        for bar in server.bars:
            took["server", bar.stage].append(bar.took_s)
        for stage in dict.fromkeys(bar.stage for row in ranks for bar in row.bars):
            took["slowest rank", stage].append(max(b.took_s for row in ranks for b in row.bars if b.stage == stage))
    for (who, stage), times in took.items():
        print(f"{who:13} {stage:18} {statistics.median(times):.3f} s  (longest {max(times):.3f})")
    tfs = [record["tfs_s"] for record in records]
    print(f"TFS   median {statistics.median(tfs):.3f}  p90 {percentile(tfs, 0.9):.3f}  max {max(tfs):.3f} s")
    print(f"pause median {statistics.median(pauses):.3f}  max {max(pauses):.3f} s")
    print(f"start median {statistics.median(starts):.1f} s")


if __name__ == "__main__":
    main()
