"""What keeping KV over a lost device brings, and what it costs: real servers, ratios within one run.

    PYTHONPATH=. $(make -s print-python) tools/bench_kv.py [loss] [decode] [commit] [restore]

``loss``: 8 streams with prompts of 2,000 tokens lose a device, with and without the mirror: how long until every stream
has a new token, and what was reused. ``decode``: tokens per second of running servers with and without a mirror, in turns.
``commit``: what the page table costs rank 0 in a decode step of 32 requests. ``restore``: how fast lost and kept heads
get into a new segment, beside a plain copy of as many bytes into new memory.
"""

import json
import mmap
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np

from anchortp_sglang.bench.server import Server
from anchortp_sglang.bench.streams import Streams
from anchortp_sglang.bench.tiny_checkpoint import write_checkpoint
from anchortp_sglang.memory.kept_slots import keep
from anchortp_sglang.memory.kv_copy import KVSegment
from anchortp_sglang.memory.kv_mirror import KVMirror, MirrorShape
from anchortp_sglang.memory.kv_moving import move_kept
from anchortp_sglang.memory.page_table import PageTable
from anchortp_sglang.planning.kv_layout import KVPlan, kv_layout, kv_moves, whole_layout
from anchortp_sglang.planning.model_axes import read_model_axes
from anchortp_sglang.planning.ownership import split
from anchortp_sglang.planning.reconfiguration import reconfigure

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
                while any((history.first_after(began + 0.05) is None) and not history.done for history in streams.histories):
                    time.sleep(0.005)
                # A message may still have been on its way when the device died.
                took[name] = max(longest_pause_s(history, began) for history in streams.histories)
            record = server.status()["recoveries"][-1]
            reused, again = record["tokens_reused"], record["tokens_recomputed"]
            print(f"{name:12} all streams go on after {took[name]:6.2f} s; TFS {record['tfs_s']:.2f} s; "
                  f"{reused} tokens reused, {again} computed again ({reused / (reused + again):.2%} reused)")  # fmt: skip
            print(f"             before: {json.dumps(lag)}; {json.dumps(record['kv'])}")
    print(f"device loss with mirror {took['without'] / took['with mirror']:.1f} times as fast to all streams resumed")


def longest_pause_s(history, since: float) -> float:
    """The longest gap between two messages of a stream that ends after ``since``."""
    times = [at for at, _ in history.arrivals]
    return max(b - a for a, b in zip(times, times[1:], strict=False) if b > since)


def measure_decode(folder: Path, model: Path, rounds: int = 6, tokens: int = 150) -> None:
    """Two servers at once, asked in turns, so that both see the same machine."""
    rates: dict[str, list[float]] = {name: [] for name in MIRROR}
    servers = {}
    try:
        for name, mirror in MIRROR.items():
            flags = (*FLAGS, "--max-total-tokens", "16384", "--anchor-kv-mirror", mirror)
            servers[name] = Server(model, 2, *flags, log=folder / f"decode-{mirror}.log")
            servers[name].start()
        for turn in range(rounds + 1):
            for name in list(servers)[:: 1 if turn % 2 else -1]:
                began = time.monotonic()
                servers[name].post("/generate", batch(tokens))
                if turn:
                    rates[name].append(PROMPTS * tokens / (time.monotonic() - began))
                urllib.request.urlopen(f"{servers[name].url}/flush_cache", timeout=60).close()
    finally:
        for server in servers.values():
            server.stop()
    for name, values in rates.items():
        print(f"decode {name:12} {statistics.median(values):7.1f} tokens/s (median of {', '.join(f'{v:.0f}' for v in values)})")
    ratios = [a / b for a, b in zip(rates["with mirror"], rates["without"], strict=True)]
    print(f"decode with mirror {statistics.median(ratios):.1%} of without (median of the turns)")


def batch(tokens: int) -> dict:
    each = requests(tokens, 32)
    return {"input_ids": [one["input_ids"] for one in each], "sampling_params": each[0]["sampling_params"]}


def measure_commit(requests_per_step: int = 32, steps: int = 400) -> None:
    """A step's commit as rank 0 makes it, with and without the caches displaced by 32 MiB in between."""
    for name, displaced in (("warm caches", np.zeros(1)), ("caches displaced", np.zeros(4 << 20))):
        slots = 1 << 16
        table = PageTable.create(bytearray(PageTable.nbytes(slots)), slots, b"bench")
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
        print(f"page-table commit, {name}: {1e6 * statistics.median(took):.1f} us per step of {requests_per_step} "
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
    table = PageTable.create(bytearray(PageTable.nbytes(rows)), rows, b"bench")
    table.commit_run(np.arange(1, rows), np.arange(1, rows) % 999, 0)
    shape = MirrorShape(whole_layout(model, rows, plan.unit_bytes(model)), table.seed)
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
    kept = keep(table.entries(), mirror.rows_of(table.hashes) >= 0, rows, 1)
    speeds = {"restore": [], "copy": []}
    for _ in range(5):
        into = KVSegment(mmap.mmap(-1, layout.total_bytes), layout)
        began = time.perf_counter()
        moved = sum(move_kept(kept, into, moves, segments.__getitem__, mirror).values())
        speeds["restore"].append(moved / (time.perf_counter() - began))
        source, target = np.frombuffer(filled(moved), np.uint8), mmap.mmap(-1, moved)
        began = time.perf_counter()
        np.copyto(np.frombuffer(target, np.uint8), source)
        speeds["copy"].append(moved / (time.perf_counter() - began))
    rates = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"restore {rates['restore'] / 1e9:.2f} GB/s of {moved / 1e6:.0f} MB, plain copy {rates['copy'] / 1e9:.2f} GB/s, "
          f"both into new memory: {rates['restore'] / rates['copy']:.0%}")  # fmt: skip


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
