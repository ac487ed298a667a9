"""anchortp_sglang.Engine: goes on through faults, ends without a trace, refuses what it cannot do."""

import json
import os
import subprocess
import sys

import leftovers

PROMPT = [5, 17, 290, 41, 6, 7]
TOKENS = 48

SCRIPT = """
import json, os, signal, sys, threading
from anchortp_sglang import Engine

if __name__ == "__main__":
    with_fault = Engine(model_path=sys.argv[1], tp_size=2, dtype="float32", max_total_tokens=2048)
    sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    unbroken = [answer["output_ids"] for answer in with_fault.generate(input_ids=prompts, sampling_params=sampling)]
    ranks = with_fault._anchor_runtime.coordinator.generation.ranks
    threading.Timer(0.3, os.kill, (ranks[1].pid, signal.SIGKILL)).start()
    broken = [answer["output_ids"] for answer in with_fault.generate(input_ids=prompts, sampling_params=sampling)]
    recoveries = with_fault._anchor_runtime.coordinator.recoveries.to_json()
    print(json.dumps({"unbroken": unbroken, "broken": broken, "recoveries": len(recoveries)}))
"""


def test_a_stream_goes_on_through_the_death_of_a_rank(forge, checkpoint, places, run_base):
    job = forge.start(
        "engine_jobs:generate_through_a_kill",
        env=places,
        model=str(checkpoint["qwen3"]),
        prompt=PROMPT,
        max_new_tokens=TOKENS,
        victim=0,
        tp_size=3,
    )
    done = job.wait()
    assert done.code == 0, done.output[-4000:]
    assert_recovered(done.value, tp_size=3)
    for name, told in done.value["refused"].items():
        assert all(text.startswith("refused: ") and name in text for text in told), (name, told)
    assert leftovers.wait_gone(job.pid, run_base) == {}


def test_calls_wait_for_a_recovery_and_raise_at_once_when_there_is_none(forge, checkpoint, places, run_base):
    job = forge.start(
        "engine_jobs:generate_until_down",
        env=places,
        model=str(checkpoint["qwen3"]),
        prompt=PROMPT,
        max_new_tokens=TOKENS,
    )
    done = job.wait()
    assert done.code == 0, done.output[-4000:]
    recovering, *ended = done.value["given"]
    assert recovering[:3] == ["recovering", done.value["unbroken"], False]
    assert [one[0] for one in ended] == ["going down"] + ["down"] * 6
    for when, text, raised, took_s in ended:
        assert raised and "--anchor-min-devices is 2" in text
        assert took_s < (10 if when == "going down" else 1)
    assert leftovers.wait_gone(job.pid, run_base) == {}


def test_a_process_with_threads_gets_a_spawned_zygote(forge, checkpoint, places, run_base):
    job = forge.start(
        "engine_jobs:generate_with_threads",
        env=places,
        model=str(checkpoint["qwen3"]),
        prompt=PROMPT,
        max_new_tokens=TOKENS,
    )
    done = job.wait()
    assert done.code == 0, done.output[-4000:]
    assert "cannot fork a zygote (it has 2 threads)" in done.output
    assert_recovered(done.value, tp_size=2)
    assert leftovers.wait_gone(job.pid, run_base) == {}


def assert_recovered(found, tp_size):
    assert found["ids"] == found["unbroken"]
    assert len(found["ids"]) == TOKENS
    status = found["status"]
    assert (status["state"], status["tp_size"]) == ("serving", tp_size)
    (recovery,) = status["recoveries"]
    assert recovery["cause"] == "process"
    assert recovery["reload_bytes"] == 0
    assert found["killed"] not in [device["rank_pid"] for device in status["devices"]]


def test_a_script_that_only_ends_leaves_nothing_behind(checkpoint, places, run_base, tmp_path):
    """As a user would write it, from a command line; the rank dies in the middle of a batch."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(checkpoint["qwen3"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | places,
        start_new_session=True,
    )
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-4000:]
    found = json.loads(output.splitlines()[-1])
    assert found["recoveries"] == 1
    assert found["broken"] == found["unbroken"]
    assert "cannot fork" not in errors
    assert leftovers.wait_gone(process.pid, run_base) == {}


def test_what_an_engine_cannot_do_is_a_value_error_that_names_it(forge, checkpoint, places):
    cases = {
        "--dp-size 2": {"dp_size": 2},
        "--speculative-algorithm": {"speculative_algorithm": "NEXTN"},
        "--ep-size 2 with --tp-size 4": {"tp_size": 4, "ep_size": 2},
        "--quantization": {"quantization": "fp8"},
        "--anchor-widths": {"tp_size": 2, "anchor_widths": (2, 1, 1)},
        "anchor_width": {"anchor_width": (2, 2)},
        "--anchor-min-devices": {"tp_size": 2, "anchor_min_devices": 3},
        "--device cuda": {"device": "cuda"},
        "at most 8": {"tp_size": 9, "dtype": "float32"},
    }
    texts = forge.value(
        "engine_jobs:engine_refusals", env=places, model=str(checkpoint["qwen3"]), cases=list(cases.values())
    )
    assert [name for name, text in zip(cases, texts, strict=True) if name not in (text or "")] == []
