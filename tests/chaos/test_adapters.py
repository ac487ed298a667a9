"""LoRA adapters outlive faults: those of --lora-paths, and those that were loaded and unloaded since."""

import os
import random
import shutil
import threading
import time
import urllib.error
from pathlib import Path

import pytest
from faults import kill_rank, lose_device, recovered, standing_by
from histories import Unbroken, assert_identical, outcomes, prompt, request
from survival import survive

from anchortp_sglang.testing.streams import Streams
from anchortp_sglang.testing.tiny_adapter import write_adapter
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

KILLS = int(os.environ.get("ANCHORTP_KILLS", "1"))
PROMPTS = [prompt(6000 + seed, 90) for seed in range(2)]


def asking(*adapters):
    """Each prompt with each adapter (None: without one): one batch, in which no two may share KV."""
    return [request(ids, 40) | {"lora_path": adapter} for ids in PROMPTS for adapter in adapters]


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    few = {"rank": 2, "projections": ("q_proj", "v_proj", "down_proj")}
    shapes = {"given": {}, "given-few": few, "loaded": {}, "late": few}
    return {name: write_adapter(folder / name, checkpoint, seed=7 + n, **shapes[name]) for n, name in enumerate(shapes)}


@pytest.fixture(scope="module")
def served(launch, folders):
    given = [f"{name}={folders[name]}" for name in ("given", "given-few")]
    with launch(3, "--lora-paths", *given, "--anchor-widths", "1,2,1") as server:
        yield server, Unbroken(server)


def test_adapters_outlive_killed_ranks_and_a_lost_device(served, folders):
    server, unbroken = served
    load(server, "loaded", folders["loaded"])
    requests = asking("given", "given-few", "loaded", None)
    expected = unbroken(requests)
    assert len({one.output_ids for one in expected}) == len(requests)
    standing_by(server, 0)
    by_standby = survive(server, requests, expected, lambda: kill_rank(server, 1), "process")
    assert by_standby["tokens_reused"] >= len(requests) * 90
    survive(server, requests, expected, lambda: kill_rank(server, 2), "process")

    load(server, "late", folders["late"], during=kill_rank(server, 0))
    assert_identical(unbroken(asking("late")), outcomes(run(server, asking("late"))))

    unload(server, "given-few")
    unload(server, "loaded")
    recovered(server, kill_rank(server, 1), "process")
    assert listed(server) == {"given", "late"}
    requests = asking("given", "given-few", "late", None)  # SGLang loads what it has had once, if it is asked for
    survive(server, requests, unbroken(requests), lambda: lose_device(server, 1), "device")
    assert server.status()["tp_size"] == 2
    assert listed(server) == {"given", "given-few", "late"}
    survive(server, requests, unbroken(requests), lambda: kill_rank(server, 0), "process")


def test_kills_at_random_moments_of_loading_and_unloading_lose_no_adapter(served, folders):
    server, unbroken = served
    load(server, "again", folders["loaded"])
    requests = asking("again", "given")
    expected = unbroken(requests)
    for seed in range(max(4, KILLS)):
        unload(server, "again") if seed % 2 else during_a_kill(server, seed, lambda: unload(server, "again"))
        assert "again" not in listed(server)
        during_a_kill(server, seed, lambda: load(server, "again", folders["loaded"]))
        assert_identical(expected, outcomes(run(server, requests)))


def test_adapters_stay_what_they_were_whatever_becomes_of_their_files(served, folders, checkpoint, tmp_path):
    server, unbroken = served
    loaded = shutil.copytree(folders["loaded"], tmp_path / "loaded")
    load(server, "changed", loaded)
    load(server, "gone", shutil.copytree(loaded, tmp_path / "gone"))
    requests = asking("given", "changed", "gone", None)
    expected = unbroken(requests)
    write_adapter(loaded, checkpoint, seed=99)
    shutil.rmtree(tmp_path / "gone")
    shutil.copytree(folders["given"], tmp_path / "kept")
    shutil.rmtree(folders["given"])
    standing_by(server, 0)
    survive(server, requests, expected, lambda: kill_rank(server, 1), "process")
    survive(server, requests, expected, lambda: kill_rank(server, 0), "process")
    shutil.rmtree(
        Path(server.status()["run_dir"]["path"]) / "adapters"
    )  # the copies are in memory; these are links to them
    survive(server, requests, expected, lambda: kill_rank(server, 1), "process")
    unload(server, "changed")
    load(server, "changed", loaded)
    before, after = expected[1::4], outcomes(run(server, asking("changed")))
    assert [one.output_ids for one in before] != [one.output_ids for one in after]
    unload(server, "given")
    with pytest.raises(urllib.error.HTTPError) as refused:
        load(server, "given", folders["given"])
    assert refused.value.code == 400 and b"is no folder" in refused.value.read()
    load(server, "given", shutil.copytree(tmp_path / "kept", folders["given"]))
    assert_identical(expected[::4], outcomes(run(server, requests[::4])))


def test_an_adapter_of_another_model_is_refused_when_it_is_loaded(served, tmp_path):
    server, unbroken = served
    other = write_checkpoint(tmp_path / "other", "qwen3", num_layers=1, hidden_size=256)
    folder, before = write_adapter(tmp_path / "foreign", other, seed=3), server.status()["generation"]
    with pytest.raises(urllib.error.HTTPError) as error:
        load(server, "foreign", folder)
    assert (error.value.code, b"another model" in error.value.read()) == (400, True)
    assert_identical(unbroken(asking("given")), outcomes(run(server, asking("given"))))
    assert server.status()["generation"] == before


def during_a_kill(server, seed, call):
    """Make a call, and kill a rank at a random moment of it."""
    pause_s, faults = random.Random(seed).uniform(0, 0.03), []
    killer = threading.Thread(target=lambda: (time.sleep(pause_s), faults.append(kill_rank(server, 0))))
    killer.start()
    call()
    killer.join()
    recovered(server, faults[0], "process")


def run(server, requests):
    with Streams(server.url, requests) as streams:
        return streams.wait(60)


def load(server, name, folder, during=None):
    """Load an adapter; ``during``: a fault that has just been caused, in whose outage it is asked for."""
    answer = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
    assert answer["success"], answer
    assert name in answer["loaded_adapters"]
    if during is not None:
        recovered(server, during, "process")


def unload(server, name):
    assert server.post("/unload_lora_adapter", {"lora_name": name})["success"]


def listed(server):
    return {one["id"] for one in server.get("/v1/models")["data"] if one.get("parent")}
