"""What keeping KV over a lost device brings, and what it costs: real servers, ratios within one run.

    PYTHONPATH=. $(make -s print-python) tools/bench_kv.py [loss] [decode] [commit] [restore]

``loss``: 8 streams with prompts of 2,000 tokens lose a device, with and without the mirror: how long until every stream
has a new token, and what was reused. ``decode``: tokens per second of two servers, with and without a mirror, in turns.
``commit``: what the slot table costs rank 0 in a decode step of 32 requests. ``restore``: how fast lost and kept heads
get into a new segment, beside a plain copy of as many bytes into new memory.
"""

import itertools
import json
import mmap
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil

from anchortp_sglang.kv.copy import KVSegment
from anchortp_sglang.kv.mirror import KVMirror, MirrorShape
from anchortp_sglang.kv.moving import move_retained
from anchortp_sglang.kv.retained_slots import retain
from anchortp_sglang.kv.slot_table import SlotTable
from anchortp_sglang.planning.layout.kv_layout import KVPlan, kv_layout, kv_moves, whole_layout
from anchortp_sglang.planning.model.axes import read_model_axes
from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.planning.placement.reconfiguration import reconfigure
from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.streams import Streams
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

FLAGS = ("--dtype", "float32", "--device", "cpu", "--anchor-allow-injection")
PROMPTS, PROMPT_TOKENS, TP = 8, 2000, 4
MIRROR = {"with mirror": "host", "without": "off"}


def requests(tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> list[dict]:
    rng = np.random.default_rng(5)
    return [
        {
            "input_ids": rng.integers(5, 400, prompt_tokens).tolist(),
            "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        }
        for _ in range(PROMPTS)
    ]


def measure_loss(folder: Path, model: Path) -> None:
    """Loss of a device under PROMPTS streams: seconds from the fault to the last stream's first new token."""
    took = {}
    for name, mirror in MIRROR.items():
        flags = (*FLAGS, "--max-total-tokens", "24576", "--anchor-kv-mirror", mirror)
        with Server(model, TP, *flags, log=folder / f"loss-{mirror}.log") as server:
            with Streams(server.url, requests(150)) as streams:
                streams.wait_tokens(20)
                lag = server.status()["kv"]
                began = time.monotonic()
                server.inject(2, "device")
                server.wait_serving(1)
            # To the last stream's next token; streams have ended by now.
            took[name] = max(longest_pause_s(history, began) for history in streams.histories)
            record = server.status()["recoveries"][-1]
            reused, again = record["tokens_reused"], record["tokens_recomputed"]
            share = reused / (reused + again)
            print(f"{name:12} all streams go on after {took[name]:6.2f} s; TFS {record['tfs_s']:.2f} s; "
                  f"{reused} tokens reused, {again} computed again ({share:.2%} reused)")  # fmt: skip
            print(f"             before: {json.dumps(lag)}; {json.dumps(record['kv'])}")
    print(f"device loss with mirror {took['without'] / took['with mirror']:.1f} times as fast to all streams resumed")


def longest_pause_s(history, since: float) -> float:
    """The longest gap between two messages of a stream that ends after ``since``."""
    times = [at for at, _ in history.arrivals]
    return max(b - a for a, b in itertools.pairwise(times) if b > since)


def measure_decode(folder: Path, model: Path, turns: int = 60, tokens: int = 40) -> None:
    """Two servers at once, asked in many short turns, so that both see the same machine."""
    took: dict[str, list[float]] = {name: [] for name in MIRROR}
    shares: dict[str, list[float]] = {name: [] for name in MIRROR}
    servers = {}
    try:
        for name, mirror in MIRROR.items():
            flags = (*FLAGS, "--max-total-tokens", "16384", "--anchor-kv-mirror", mirror)
            servers[name] = Server(model, 2, *flags, log=folder / f"decode-{mirror}.log")
            servers[name].start()
        for turn in range(turns + 2):
            for name in list(servers)[:: 1 if turn % 2 else -1]:
                began, busy = time.monotonic(), helpers_cpu_s(servers[name])
                servers[name].post("/generate", batch(tokens))
                if turn > 1:
                    took[name].append(time.monotonic() - began)
                    shares[name].append((helpers_cpu_s(servers[name]) - busy) / took[name][-1])
                urllib.request.urlopen(f"{servers[name].url}/flush_cache", timeout=60).close()
    finally:
        for server in servers.values():
            server.stop()
    for name, times in took.items():
        rate, share = PROMPTS * tokens / statistics.median(times), statistics.fmean(shares[name])
        print(f"decode {name:12} {rate:7.1f} tokens/s; threads beside the ranks' main ones take {share:.2%} of a core")
    ratios = sorted(b / a for a, b in zip(took["with mirror"], took["without"], strict=True))
    print(f"decode with mirror {statistics.median(ratios):.1%} of without (median of {turns} turns, half of them from "
          f"{ratios[turns // 4]:.1%} to {ratios[3 * turns // 4]:.1%})")  # fmt: skip


def helpers_cpu_s(server: Server) -> float:
    """CPU seconds so far of all threads of the ranks but their main ones."""
    pids = [device["rank_pid"] for device in server.status()["devices"]]
    return sum(t.user_time + t.system_time for pid in pids for t in psutil.Process(pid).threads() if t.id != pid)


def batch(tokens: int) -> dict:
    each = requests(tokens, 32)
    return {"input_ids": [one["input_ids"] for one in each], "sampling_params": each[0]["sampling_params"]}


def measure_commit(requests_per_step: int = 32, steps: int = 400) -> None:
    """A step's commit as rank 0 makes it, with and without the caches displaced by 32 MiB in between."""
    for name, displaced in (("warm caches", np.zeros(1)), ("caches displaced", np.zeros(4 << 20))):
        slots = 1 << 16
        table = SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, b"bench")
        free = iter(range(1, slots))
        last = [next(free) for _ in range(requests_per_step)]
        for slot in last:
            table.commit_run([slot], [7], 0)
        rng = np.random.default_rng(1)
        took = []
        for _ in range(steps):
            new, tokens = [next(free) for _ in last], rng.integers(0, 1000, len(last)).tolist()
            displaced += 1
            began = time.perf_counter()
            table.commit_tokens(zip(new, tokens, last, strict=True))
            took.append(time.perf_counter() - began)
            last = new
        print(f"slot-table commit, {name}: {1e6 * statistics.median(took):.1f} us per step of {requests_per_step} "
              f"requests (least {1e6 * min(took):.1f} us)")  # fmt: skip


def measure_restore(rows: int = 16384) -> None:
    """A rank of an 8-head model with 128 dimensions in bfloat16 takes over lost heads of all slots."""
    model = read_model_axes(
        {
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 4096,
            "vocab_size": 1024, "dtype": "bfloat16",
        }
    )  # fmt: skip
    plan = KVPlan(rows - 1, 1, 2)
    old = split(model, (0, 1, 2, 3))
    new = reconfigure(model, old, (0, 1, 3))
    rank = max(range(3), key=lambda each: new.units("kv_head", each))
    table = SlotTable.create(bytearray(SlotTable.nbytes(rows)), rows, b"bench")
    table.commit_run(np.arange(1, rows), np.arange(1, rows) % 999, 0)
    shape = MirrorShape(whole_layout(model, plan, rows), table.entries().seed)
    mirror = KVMirror.attach_or_create(filled(shape.nbytes), shape)
    mirror.begin(0, 4)
    every = np.arange(1, rows)
    mirror.assign(every, every, table.hashes[every])
    for writer in range(4):
        mirror.set_tags(writer, every, table.hashes[every])
    layouts = {device: kv_layout(model, plan, old, at) for at, device in enumerate(old.devices)}
    segments = {device: KVSegment(filled(layout.total_bytes), layout) for device, layout in layouts.items()}
    layout = kv_layout(model, plan, new, rank)
    moves = kv_moves(model, new, rank, old)
    retained = retain(table.entries(), mirror.rows_of(table.hashes) >= 0, rows, 1)
    speeds = {"restore": [], "copy": []}
    for _ in range(5):
        into = KVSegment(mmap.mmap(-1, layout.total_bytes), layout)
        began = time.perf_counter()
        moved = sum(move_retained(retained, into, moves, segments.__getitem__, mirror).values())
        speeds["restore"].append(moved / (time.perf_counter() - began))
        source, target = np.frombuffer(filled(moved), np.uint8), mmap.mmap(-1, moved)
        began = time.perf_counter()
        np.copyto(np.frombuffer(target, np.uint8), source)
        speeds["copy"].append(moved / (time.perf_counter() - began))
    rates = {name: statistics.median(values) for name, values in speeds.items()}
    share = rates["restore"] / rates["copy"]
    print(f"restore {rates['restore'] / 1e9:.2f} GB/s of {moved / 1e6:.0f} MB, plain copy "
          f"{rates['copy'] / 1e9:.2f} GB/s, both into new memory: {share:.0%}")  # fmt: skip


def filled(nbytes: int) -> mmap.mmap:
    """Memory that has been touched."""
    memory = mmap.mmap(-1, nbytes)
    np.frombuffer(memory, np.uint8)[:] = 1
    return memory


def main() -> None:
    asked = sys.argv[1:] or ["loss", "decode", "commit", "restore"]
    with tempfile.TemporaryDirectory(prefix="atp") as name:
        folder = Path(name)
        if "commit" in asked:
            measure_commit()
        if "restore" in asked:
            measure_restore()
        if {"loss", "decode"} & set(asked):
            model = write_checkpoint(folder / "model", "qwen3", num_layers=6)
            if "decode" in asked:
                measure_decode(folder, model)
            if "loss" in asked:
                measure_loss(folder, model)


if __name__ == "__main__":
    main()
