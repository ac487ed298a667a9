"""Times what the slot table costs at the size of real caches, without a server.

    PYTHONPATH=. $(make -s print-python) tools/time_slot_table.py
    PYTHONPATH=. $(make -s print-python) tools/time_slot_table.py --chain 4000 --insert --slots 1048576
    PYTHONPATH=. $(make -s print-python) tools/time_slot_table.py --followed [--page-size 64]

Chains of random tokens, in slots in random order; least of the repetitions, in ms:

- ``verify``: find the intact chains; ``retain``: that, and choose what the next generation retains, here all of it;
  ``chains``: order the slots of each; ``agree``: the digest that ranks compare; ``insert``: what else it takes to have
  SGLang's prefix tree hold them. A recovery needs ``retain`` and what follows, ``all``, on every rank.
- ``shrink``: retain half of the slots; ``choose``: choose what a mirror with half as many rows holds, and ``search``:
  that with all that is done to the mirror's rows then.
- ``step``: commit a decode step of 32 requests; ``prompt``: commit a prompt of 4,000 tokens.

With ``--followed`` instead: what a rank of a standby needs that has followed the table, after ``changed`` slots have
changed since its last look; then what a rank needs that has not. The table is full, with up to 256 open requests:

- ``steps``: each has taken 8 decode steps; ``prefill``: 8 chains, or a quarter of them, have been evicted for prompts
  of as many tokens, which is a second of prefill at 32,000 tokens/s;
- ``read``: find the changed slots and put their chains right, or ``retain``; ``chains``, ``agree``, ``insert``, ``all``
  as above;
- ``first``: the CPU time of the first look of a standby, ``look``: that of one while nothing changes. A pause follows
  that is 199 times as long.
"""

import argparse
import mmap
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from anchortp_sglang.kv.chain_hash import root_hash
from anchortp_sglang.kv.followed_table import WORTHWHILE, FollowedTable
from anchortp_sglang.kv.mirror import KVMirror, MirrorShape
from anchortp_sglang.kv.mirror_schedule import MirrorSchedule
from anchortp_sglang.kv.retained_slots import Entries, RetainedSlots, most_urgent, retain
from anchortp_sglang.kv.slot_table import SlotTable

FOLLOWED = ("read", "chains", "agree", "insert", "all")
COLUMNS = ("verify", "retain", "chains", "agree", "insert", "all", "shrink", "choose", "search", "step", "prompt")
MODEL = b"time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default="16384,131072,1048576,4194304")
    parser.add_argument("--chain", type=int, default=4000, help="tokens of each chain")
    parser.add_argument("--insert", action="store_true", help="insert them in SGLang's tree too (imports SGLang)")
    parser.add_argument("--followed", action="store_true", help="time a standby that has followed (imports SGLang)")
    parser.add_argument("--page-size", type=int, default=1, help="slots of a page, with --followed")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    if options.insert or options.followed:
        publish_settings()
    if options.followed:
        print("     slots   changed since    " + "".join(f"{name:>10}" for name in (*FOLLOWED, "first", "look")))
        for slots in map(int, options.slots.split(",")):
            measure_followed(slots, options.chain, options.page_size, options.repeat)
        return
    print("     slots" + "".join(f"{name:>10}" for name in COLUMNS))
    for slots in map(int, options.slots.split(",")):
        found = measure(slots, options.chain, options.repeat, options.insert)
        print(f"{slots:10}" + "".join(f"{1e3 * found.get(name, 0):10.3f}" for name in COLUMNS), flush=True)


def measure(slots: int, chain: int, repeat: int, insert: bool) -> dict[str, float]:
    table = SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, MODEL)
    rng = np.random.default_rng(0)
    places = rng.permutation(slots - 1) + 1
    for begin in range(0, len(places), chain):
        own = places[begin : begin + chain]
        table.commit_run(own, rng.integers(0, 1 << 40, len(own)), 0)
    entries = table.entries()
    retained = retain(entries, None, slots, 1)
    assert len(retained.slots) == slots - 1
    took = {
        "verify": least(repeat, entries.forest),
        "retain": least(repeat, lambda: retain(table.entries(), None, slots, 1)),
        "chains": least(repeat, retained.chains),
        "agree": least(repeat, retained.digest),
        "shrink": least(repeat, lambda: retain(entries, None, slots // 2, 1)),
        "choose": least(repeat, lambda: most_urgent(entries.forest(), entries, slots // 2, 1)),
        "search": search(table, repeat),
    }
    took["insert"] = insertion(retained, slots, repeat) - took["chains"] if insert else 0.0
    took["all"] = sum(took[name] for name in ("retain", "chains", "agree", "insert"))
    last, fresh = places[:32].tolist(), iter(places[32:].tolist())

    def step() -> None:
        nonlocal last
        new = [next(fresh) for _ in last]
        table.commit_tokens([(slot, 7, above) for slot, above in zip(new, last, strict=True)])
        last = new

    took["step"] = least(100, step)
    took["prompt"] = least(
        20, lambda: table.commit_run(places[:4000], rng.integers(0, 100_000, min(4000, slots - 1)), 0)
    )
    return took


def measure_followed(slots: int, chain: int, page_size: int, repeat: int) -> None:
    """Print a line for each kind of change, and one for a rank that has not followed."""
    chain = min(chain, slots // 16) // page_size * page_size

    def read_whole(entries: Entries) -> RetainedSlots:
        return retain(entries, None, slots, page_size)

    for kind, change in ("steps", take_steps), ("prefill", prefill):
        best: dict[str, float] = {}
        for _ in range(repeat):
            table, chains, free = full_table(slots, chain, page_size)
            followed = FollowedTable(table, page_size)

            def read(entries: Entries, followed: FollowedTable = followed) -> RetainedSlots:
                return followed.retained(entries, WORTHWHILE) or read_whole(entries)

            first = cpu_time(followed.look)
            look = min(cpu_time(followed.look) for _ in range(5))
            change(table, chains, free)
            changed = followed.compare()
            assert changed is not None
            took = take_over(table, page_size, read) | {"first": first, "look": look}
            best = {name: min(took[name], best.get(name, 1e9)) for name in took}
        print_followed(slots, f"{len(changed):10} {kind:9}", best)
    whole = [take_over(table, page_size, read_whole) for _ in range(repeat)]
    print_followed(slots, "not followed".rjust(20), {name: min(took[name] for took in whole) for name in whole[0]})


def print_followed(slots: int, kind: str, took: dict[str, float]) -> None:
    found = "".join(f"{1e3 * took[name]:10.3f}" for name in (*FOLLOWED, "first", "look") if name in took)
    print(f"{slots:10}{kind:20}{found}", flush=True)


def full_table(slots: int, chain: int, page_size: int) -> tuple[SlotTable, list[np.ndarray], np.ndarray]:
    """Return a table that is full but for 8 steps of its chains, up to 256 of them; its chains and its free slots.

    Free slots: int64[8, chains], the next ones of each chain. Those of a chain are in pages.
    """
    table = SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, MODEL)
    rng = np.random.default_rng(0)
    pages = rng.permutation(slots // page_size - 1) + 1
    places = (pages[:, None] * page_size + np.arange(page_size)).ravel()
    of_each = -(-8 // page_size) * page_size
    n_free = of_each * min(256, slots // chain)
    free = places[:n_free].reshape(-1, of_each)[:, :8].T
    used, chains = places[n_free:], []
    for begin in range(0, len(used), chain):
        chains.append(used[begin : begin + chain])
        table.commit_run(chains[-1], rng.integers(0, 1 << 40, len(chains[-1])), 0)
    return table, chains, free


def take_steps(table: SlotTable, chains: list[np.ndarray], free: np.ndarray) -> None:
    ends = np.array([own[-1] for own in chains[: free.shape[1]]])
    for new in free[:, : len(ends)]:
        table.commit_step(new, new, ends)
        ends = new


def prefill(table: SlotTable, chains: list[np.ndarray], free: np.ndarray) -> None:
    for own in chains[: min(8, len(chains) // 4)]:
        table.invalidate(own)
        table.commit_run(own, own, 0)


def take_over(table: SlotTable, page_size: int, read: Callable[[Entries], RetainedSlots]) -> dict[str, float]:
    """Time the parts of a take-over."""
    import torch

    from anchortp_sglang.rank.kv.following import HeapReserve
    from anchortp_sglang.rank.kv.prefixes import insert

    torch.set_num_threads(1)
    heap = HeapReserve(table.slots)
    heap.release()
    tree, entries, times = new_tree(table.slots, page_size), table.entries(), [time.perf_counter()]
    retained = read(entries)
    times.append(time.perf_counter())
    chains = retained.chains()
    times.append(time.perf_counter())
    retained.digest()
    times.append(time.perf_counter())
    insert(replace(retained, forest=SimpleNamespace(chains=lambda tokens, last_use: chains)), tree)
    times.append(time.perf_counter())
    took: dict[str, float] = dict(zip(FOLLOWED, np.diff(times).tolist(), strict=False))
    return took | {"all": times[-1] - times[0]}


def cpu_time(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def search(table: SlotTable, repeat: int) -> float:
    """Time a search of rank 0 for what a mirror with half as many rows holds, once that is chosen."""
    layout: Any = SimpleNamespace(rows=table.slots // 2, total_bytes=0)
    shape = MirrorShape(layout, root_hash(MODEL))
    mirror = KVMirror.__new__(KVMirror)
    memory = np.frombuffer(mmap.mmap(-1, 16 * shape.rows), np.int64).reshape(2, shape.rows)
    mirror.shape, mirror._header = shape, np.zeros(8, np.uint64)
    mirror.hashes, mirror.slots = memory[0].view(np.uint64), memory[1]
    mirror._tags = mirror.hashes[None]
    schedule = MirrorSchedule(table, mirror, 1e18)
    schedule._bucket = SimpleNamespace(allowance=lambda now: table.slots, spend=lambda rows: None)  # type: ignore
    schedule.assign(0.0)
    return least(repeat, schedule._search)


def publish_settings() -> None:
    """Publish the settings that SGLang's memory reads."""
    from anchortp_sglang.startup import device

    device.install_stand_ins()
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    ranks = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    runtime_context.publish(ServerArgs(model_path="none", device="cpu"), role="scheduler", ranks=ranks)


def insertion(retained: RetainedSlots, slots: int, repeat: int) -> float:
    """Time the insertion of all chains in a new prefix tree, ordering included."""
    import torch

    from anchortp_sglang.rank.kv.prefixes import insert

    torch.set_num_threads(1)
    made = [new_tree(slots, 1) for _ in range(repeat)]
    return least(repeat, lambda: insert(retained, made.pop()))


def new_tree(slots: int, page_size: int) -> Any:
    """Return what SGLang's kv_cache_builder.build_kv_cache returns, as far as it is read."""
    import torch
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    pool: Any = None
    allocator: Any = TokenToKVPoolAllocator(slots - 1, torch.float32, "cpu", pool, False)
    if page_size > 1:
        allocator = PagedTokenToKVPoolAllocator(slots - page_size, page_size, torch.float32, "cpu", pool, False)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(1, 1, "cpu", False),
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
        tree_components=(ComponentType.FULL,),
    )
    return SimpleNamespace(token_to_kv_pool_allocator=allocator, tree_cache=UnifiedRadixCache(params))


def least(repeat: int, work: Callable[[], object]) -> float:
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
