"""A status with recoveries of every kind, as a real server gave it (tests/chaos/test_metrics_and_timeline.py)."""


def stages(**at_s):
    return [{"name": name, "at_s": at} for name, at in at_s.items()]


def rank(number, device, late_s=0.0, start_s=0.15, moved_bytes=0):
    steps = {"attached": 0.03, "bytes_moved": 0.11, "groups_ready": 0.18, "weights_bound": 0.24}
    steps |= {"prefixes_rebuilt": 0.27, "bound": 0.31}
    at_s = {name: round(start_s + step + late_s, 4) for name, step in steps.items()}
    return {"rank": number, "device": device, "stages": stages(**at_s), "moved_bytes": moved_bytes}


def recovery(generation, cause, device, ranks, **more):
    server = {"detected": 0.0, "reaped": 0.06, "fenced": 0.07, "planned": 0.09, "forked": 0.15}
    at = {"groups_ready": 0.36, "bound": 0.49, "ready": 0.5, "replayed": 0.51, "first_token": 0.58}
    return {
        "generation": generation,
        "cause": cause,
        "device": device,
        "lost": [device] if cause == "device" else [],
        "reason": f"the rank on device {device} died, its anchor lives",
        "stages": stages(**server | at),
        "ranks": ranks,
        "tfs_s": 0.58,
        "ttp_s": 0.4,
        "reload_bytes": 0,
        "p2p_bytes": 0,
        "copied_bytes": 0,
        "requests_replayed": 8,
        "tokens_reused": 661,
        "tokens_recomputed": 8,
        "failed": None,
    } | more


KILL = recovery(1, "process", 1, [rank(n, n, 0.01 * n) for n in range(4)])
LOSS = recovery(
    2,
    "device",
    2,
    [rank(n, device, 0.02 * n, moved_bytes=4 << 20) for n, device in enumerate((0, 1, 3))],
    reason="anchor and rank of device 2 are dead: its memory is gone",
    reload_bytes=11 << 20,
    copied_bytes=3 << 20,
    tokens_reused=0,
    tokens_recomputed=1469,
)
GIVEN_UP = recovery(
    3,
    "device",
    0,
    [],
    stages=stages(detected=0.0, reaped=0.06, gave_up=0.1),
    tfs_s=None,
    ttp_s=None,
    failed="1 of 4 devices are left, <b>--anchor-min-devices</b> is 2",
)
SERVING = {"state": "serving", "anchor_pid": 21, "rank_pid": 11, "weight_bytes": 11 << 20, "kv_bytes": 5 << 20}
LOST = {"state": "lost", "rank": None, "rank_pid": None, "anchor_pid": None, "weight_bytes": 0, "kv_bytes": 0}
STATUS = {
    "state": "degraded",
    "generation": 3,
    "tp_size": 3,
    "devices": [
        {"id": 0, "rank": 0} | SERVING,
        {"id": 1, "rank": 1} | SERVING,
        {"id": 2} | LOST,
        {"id": 3, "rank": 2} | SERVING,
    ],
    "kv": {"slots": 8192, "used": 900, "mirror": {"mirrored": 880, "lag_slots": 20}},
    "recoveries": [KILL, LOSS, GIVEN_UP],
    "fruitless_faults": 0,
    "suspects": 0,
    "paused": False,
    "standby": "ready",
    "requests_ended": {"unservable": 3, "fruitless": 0, "given_up": 0},
}
