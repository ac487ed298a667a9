"""Loses nodes of a fleet under open streams, again and again, and judges every stream; then the ingress's latency.

    python tools/fleet_storm.py --losses 20 --streams 12 [--out fleet.json]

All of it runs on this machine: Ray's nodes are processes, a node that is lost is killed with all that runs on it. With
each loss some of the streams are on the node. ``--kinds node,main,hang`` also kills main processes, or stops them (a
host that no longer answers). ``RAY_SERVE_ENABLE_HA_PROXY=1`` has HAProxy in front, as launch/ does. Steps that cost
minutes are asked for: ``--autoscale``. The exit code is 1 if a stream failed or was wrong.
"""

import argparse
import http.client
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fleet_rig import LocalFleet, main_of, until

from anchortp_sglang.testing.streams import History, Streams
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

FLAGS = "--dtype float32 --device cpu --max-total-tokens 16384 --anchor-standby off"
HANG_S = 20.0


def request(seed: int, tokens: int) -> dict[str, Any]:
    draw = random.Random(seed)
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": draw.choices(range(480), k=30), "sampling_params": params}


def outcome(history: History) -> tuple[Any, ...]:
    counted = history.meta.get("completion_tokens"), history.meta.get("prompt_tokens")
    return tuple(history.output_ids), history.text, json.dumps(history.finish_reason), counted


def ask(url: str, requests: list[dict[str, Any]]) -> list[History]:
    with Streams(url, requests) as streams:
        pass
    return streams.histories


def lose(fleet: LocalFleet, kind: str, server: dict[str, Any]) -> None:
    """Let a server be lost, with its node or alone."""
    if kind == "node":
        return fleet.lose_node(server["node"])
    main = main_of(server)
    main.send_signal(signal.SIGKILL if kind == "main" else signal.SIGSTOP)
    if kind == "hang":
        time.sleep(HANG_S)
        if main.is_running():
            main.send_signal(signal.SIGCONT)


def storm(fleet: LocalFleet, args: argparse.Namespace) -> dict[str, Any]:
    draw, kinds = random.Random(args.seed), args.kinds.split(",")
    requests = [request(seed, args.tokens) for seed in range(args.streams)]
    expected = [outcome(history) for history in ask(fleet.url, requests)]
    usual = [history.longest_pause_s() for history in ask(fleet.url, requests)]
    failed = wrong = moved = 0
    pauses: list[float] = []
    for number in range(args.losses):
        kind = kinds[number % len(kinds)]
        servers = fleet.wait_servers(args.nodes, 300)
        with Streams(fleet.url, requests) as streams:
            streams.wait_tokens(draw.randrange(1, args.tokens * 2 // 3))
            lost = max(fleet.servers() or servers, key=lambda one: one["status"]["open_requests"])
            lose(fleet, kind, lost)
        # Not before: a server that starts would take the CPUs of the one that goes on, and hosts have their own.
        if kind == "node":
            fleet.add_node()
        found = fleet.get("/anchortp/status")["ingress"]["moved"] - moved
        moved += found
        errors = [history.error for history in streams.histories if history.error]
        failed += len(errors)
        wrong += sum(
            history.error is None and outcome(history) != one
            for history, one in zip(streams.histories, expected, strict=True)
        )
        pauses += sorted((history.longest_pause_s() for history in streams.histories), reverse=True)[:found]
        print(
            f"loss {number + 1} ({kind}): {found} moved, longest pause {max(pauses, default=0):.2f} s",
            *errors[:1],
            flush=True,
        )
    return {
        "losses": args.losses,
        "streams": args.losses * args.streams,
        "moved": moved,
        "failed": failed,
        "wrong": wrong,
        "pause_s": quantiles(pauses),
        "longest_gap_without_loss_s": round(max(usual), 3),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {
        "p50": round(statistics.median(ordered), 3),
        "p90": round(ordered[int(0.9 * (len(ordered) - 1))], 3),
        "max": round(ordered[-1], 3),
    }


def latency(fleet: LocalFleet, rounds: int) -> dict[str, Any]:
    """Compare requests of one token through the fleet with the same sent to a server, in turn."""
    direct = http.client.HTTPConnection(urlsplit(fleet.servers()[0]["url"]).netloc)
    through = http.client.HTTPConnection(urlsplit(fleet.url).netloc)
    result = {}
    for stream in (False, True):
        body = json.dumps(request(1, 1) | {"stream": stream})
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for connection, taken in zip((direct, through), times, strict=True):
                began = time.perf_counter()
                connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                taken.append(1000 * (time.perf_counter() - began))
        added = statistics.median(times[1]) - statistics.median(times[0])
        result["streamed" if stream else "whole"] = {
            "direct_p50_ms": round(statistics.median(times[0]), 2),
            "through_p50_ms": round(statistics.median(times[1]), 2),
            "added_p50_ms": round(added, 2),
        }
    return result


def autoscale(fleet: LocalFleet, args: argparse.Namespace) -> dict[str, Any]:
    """Go from one server to two under load, and back when it ends; no stream may fail."""
    scale = {"min": 1, "max": 2, "target_open": 2.0, "upscale_delay_s": 1.0, "downscale_delay_s": 3.0}
    fleet.deploy(replicas=1, autoscale=scale)
    fleet.wait_servers(1, 300)
    requests = [request(seed, args.tokens) for seed in range(args.streams)]
    expected = [outcome(history) for history in ask(fleet.url, requests)]
    began, bad, up_s = time.monotonic(), 0, None
    while up_s is None and time.monotonic() - began < 240:
        bad += sum(outcome(h) != one for h, one in zip(ask(fleet.url, requests), expected, strict=True))
        if len(fleet.servers()) == 2:
            up_s = time.monotonic() - began
    ended = time.monotonic()
    until(lambda: len(fleet.servers()) == 1, "back to one server", 240)
    return {"up_s": up_s and round(up_s, 1), "down_s": round(time.monotonic() - ended, 1), "failed_or_wrong": bad}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=20)
    parser.add_argument("--streams", type=int, default=12, help="open at each loss")
    parser.add_argument("--tokens", type=int, default=120, help="of each stream")
    parser.add_argument("--nodes", type=int, default=2, help="with one server each")
    parser.add_argument("--kinds", default="node", help="node, main, hang, with commas")
    parser.add_argument("--rounds", type=int, default=300, help="of the latency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoscale", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder) / "qwen3", "qwen3")
        config = {"model_path": str(model), "arguments": FLAGS, "replicas": args.nodes, "ingresses": 1, "drain_s": 1}
        with LocalFleet(args.nodes, **config) as fleet:
            fleet.deploy()
            fleet.wait_servers(args.nodes, 300)
            result["latency"] = latency(fleet, args.rounds)
            print(json.dumps(result["latency"]), flush=True)
            result["storm"] = storm(fleet, args) if args.losses else {"failed": 0, "wrong": 0}
            if args.autoscale:
                result["autoscale"] = autoscale(fleet, args)
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2))
    bad = result["storm"]["failed"] + result["storm"]["wrong"] + result.get("autoscale", {}).get("failed_or_wrong", 0)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
