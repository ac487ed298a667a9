"""What our hooks cost of a decode step, timed inside the scheduler of a live server.

    PYTHONPATH=. $(make -s print-python) tools/time_hooks.py [--tp 1] [--streams 8] [--tokens 200] [--overlap]

Prints, for each hook that runs in rank 0's decode loop, the median and the mean over the steps, and their share of
a step. Timers cost about 0.1 µs each. It starts itself a second time as the server, with a timer around each hook.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

RESULT = "ANCHORTP_TIME_HOOKS"
WARM_UP_STEPS = 20


def serve() -> None:
    """Be the server; rank 0 leaves the times of its steps in the file named by the environment."""
    from anchortp_sglang import launch_server
    from anchortp_sglang.hooks.flags import given_flags
    from anchortp_sglang.options import split_argv
    from anchortp_sglang.startup import device

    options, rest = split_argv(sys.argv[1:])
    given = given_flags(rest)
    device.prepare(device.choose_platform(given), given, options.overlap)  # before SGLang is imported
    from anchortp_sglang.hooks import table
    from anchortp_sglang.rank.attachment import current

    spent: dict[str, float] = defaultdict(float)
    steps: list[dict[str, float]] = []
    last_end = 0.0

    def timed(name, function):
        def wrapper(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return wrapper

    def step_ends(processor, batch, *args, **kwargs):
        nonlocal last_end
        now = time.perf_counter()
        steps.append(dict(spent) | {"step": now - last_end, "batch": len(batch.reqs)})
        spent.clear()
        last_end = now
        if len(steps) % 50 == 0 and current().prefixes.table is not None:  # rank 0
            Path(os.environ[RESULT]).write_text(json.dumps(steps))

    around = table.Hook(
        "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
        "process_batch_result_decode",
        "after",
        lambda result, *args, **kwargs: step_ends(*args, **kwargs),
        "a step ends",
    )
    hooks = [
        replace(hook, function=timed(f"{hook.function.__module__.rsplit('.', 1)[-1]}.{hook.function.__name__}",
                                     hook.function))
        for hook in table.HOOKS if hook.kind in ("before", "after") and not hook.target.endswith("__init__")
    ]  # fmt: skip
    timed_targets = {hook.target for hook in hooks}
    table.HOOKS = (*(h for h in table.HOOKS if h.target not in timed_targets), *hooks, around)
    launch_server.main(sys.argv[1:])


def measure(tp: int, streams: int, tokens: int, overlap: bool) -> None:
    from anchortp_sglang.testing.server import Server
    from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(prefix="atp") as name:
        folder = Path(name)
        result = folder / "steps.json"
        model = write_checkpoint(folder / "model", "qwen3", num_layers=6)
        slots = max(16384, 2 * streams * (20 + tokens))
        flags = ["--device", "cpu", "--dtype", "float32", "--max-total-tokens", str(slots), "--anchor-allow-drift"]
        flags += ["--anchor-overlap", "on" if overlap else "off"]
        env = {RESULT: str(result), "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), "."))}
        server = Server(model, tp, *flags, log=folder / "server.log", module="time_hooks", env=env)
        with server:
            server.post("/generate", {
                "input_ids": [list(range(5 + i, 25 + i)) for i in range(streams)],
                "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
            })  # fmt: skip
        report(json.loads(result.read_text()), streams)


def report(steps: list[dict[str, float]], streams: int) -> None:
    full = [step for step in steps if step["batch"] == streams][WARM_UP_STEPS:]
    took = statistics.median(step["step"] for step in full)
    print(f"{len(full)} steps of {streams} requests, median {1e3 * took:.2f} ms")
    names = {name for step in full for name in step} - {"step", "batch"}
    for name in (*sorted(names), "all hooks"):
        costs = [sum(step.get(n, 0) for n in (names if name == "all hooks" else {name})) for step in full]
        median, mean = statistics.median(costs), statistics.fmean(costs)
        print(f"{name:45} median {1e6 * median:7.1f} us  mean {1e6 * mean:7.1f} us  {median / took:7.2%} of a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--overlap", action="store_true", help="use SGLang's overlap schedule")
    asked = parser.parse_args()
    measure(asked.tp, asked.streams, asked.tokens, asked.overlap)


if __name__ == "__main__":
    serve() if RESULT in os.environ else main()
