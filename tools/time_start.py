#!/usr/bin/env python3
"""Time from the start of a server's process to its first token, ours and stock's in turn, on the same tiny model.

PYTHONPATH=. python tools/time_start.py [--family qwen3_moe] [--tp 2] [--runs 3]

Stock's processes are forked here from one that has imported SGLang (testing/stock_server.py), where SGLang by itself
spawns each of them anew: its times are better than an operator's.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

MODULES = {"ours": "anchortp_sglang.launch_server", "stock": "anchortp_sglang.testing.stock_server"}
FLAGS = ("--dtype", "float32", "--max-total-tokens", "4096", "--skip-server-warmup")
REQUEST = {"input_ids": [1, 2, 3], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}


def first_token_s(side: str, model: Path, tp_size: int, folder: Path) -> float:
    began = time.monotonic()
    log = folder / f"{side}.log"
    with Server(model, tp_size, *FLAGS, log=log, module=MODULES[side], env={"TMPDIR": str(folder)}) as server:
        server.post("/generate", REQUEST)
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from start to first token.")
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {side: [] for side in MODULES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_checkpoint(folder / "model", options.family)
        for _ in range(options.runs):
            for side, found in times.items():
                found.append(first_token_s(side, model, options.tp, folder))
                print(f"{side}: {found[-1]:.1f} s", flush=True)
    medians = {side: statistics.median(found) for side, found in times.items()}
    print(f"median: ours {medians['ours']:.1f} s, stock {medians['stock']:.1f} s,", end=" ")
    print(f"{medians['ours'] / medians['stock'] - 1:+.0%}")


if __name__ == "__main__":
    main()
