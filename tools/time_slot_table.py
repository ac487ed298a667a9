"""Times what a recovery and the mirror do with the slot table, at the size of real caches. No model is needed.

    PYTHONPATH=. $(make -s print-python) tools/time_slot_table.py [--slots 16384,131072,1048576,4194304] [--chain 2000]

The table is full of chains of random tokens, in random slots. Each figure is the least of some repetitions, in ms:

- ``read``: copy the entries; ``retain``: verify them and choose what the next generation retains, here all of it;
  ``chains``: order the slots of each; ``agree``: the digest that ranks compare. A recovery needs these, on every rank.
- ``shrink``: retain half of the slots; ``choose``: choose what a mirror with half as many rows holds.
- ``step``: commit a decode step of 32 requests; ``prompt``: commit a prompt of 4,000 tokens.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from anchortp_sglang.kv.retained_slots import most_urgent, retain
from anchortp_sglang.kv.slot_table import SlotTable

COLUMNS = ("read", "retain", "chains", "agree", "shrink", "choose", "step", "prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default="16384,131072,1048576,4194304")
    parser.add_argument("--chain", type=int, default=2000, help="tokens of each chain")
    options = parser.parse_args()
    print("     slots" + "".join(f"{name:>10}" for name in COLUMNS))
    for slots in map(int, options.slots.split(",")):
        found = measure(slots, options.chain)
        print(f"{slots:10}" + "".join(f"{1e3 * found[name]:10.3f}" for name in COLUMNS), flush=True)


def measure(slots: int, chain: int) -> dict[str, float]:
    table = SlotTable.create(bytearray(SlotTable.nbytes(slots)), slots, b"time")
    rng = np.random.default_rng(0)
    places = rng.permutation(slots - 1) + 1
    for begin in range(0, len(places), chain):
        own = places[begin : begin + chain]
        table.commit_run(own, rng.integers(0, 1 << 40, len(own)), 0)
    repeats = 3 if slots > 1 << 20 else 7
    entries = table.entries()
    retained = retain(entries, None, slots, 1)
    assert len(retained.slots) == slots - 1
    took = {
        "read": least(repeats, table.entries),
        "retain": least(repeats, lambda: retain(entries, None, slots, 1)),
        "chains": least(repeats, retained.chains),
        "agree": least(repeats, retained.digest),
        "shrink": least(repeats, lambda: retain(entries, None, slots // 2, 1)),
        "choose": least(repeats, lambda: most_urgent(entries, entries.verified(), slots // 2, 1)),
    }
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


def least(repeats: int, work: Callable[[], object]) -> float:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    main()
