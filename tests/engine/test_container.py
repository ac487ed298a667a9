"""The server as launch/kubernetes.yaml runs it: no root, no capabilities, a read-only root, little memory."""

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import container
import psutil
import pytest
import yaml

from anchortp_sglang.testing.server import Server

LIMIT_BYTES = 3 << 30
ASK = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 24, "temperature": 0}}


def can_make_namespaces():
    done = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return os.geteuid() == 0 and done.returncode == 0


@pytest.fixture(scope="module")
def manifest():
    return container.Manifest.read()


@pytest.fixture
def group():
    """A memory group of 3 GiB, None where none can be made."""
    paths = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    version_1 = "memory" in paths
    top, path = ("memory", paths["memory"]) if version_1 else ("", paths.get("", "/"))
    folder = Path("/sys/fs/cgroup", top, path.lstrip("/"), f"anchortp-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(LIMIT_BYTES))
    except OSError:
        folder = None
    yield folder
    if folder is not None:
        deadline = time.monotonic() + 10
        while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        folder.rmdir()


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and namespaces")
def test_it_serves_and_survives_as_the_manifest_runs_it(checkpoint, manifest, group, tmp_path):
    server = Server(checkpoint["qwen3"], 2, log=tmp_path / "log")
    more = ["--tp-size=2", "--host=127.0.0.1", f"--port={server.port}", "--dtype=float32"]
    new_root = tmp_path / "root"
    new_root.mkdir()
    model = shutil.copytree(checkpoint["qwen3"], tmp_path / "model")
    for file in model.iterdir():
        file.chmod(0o644)  # safetensors writes for its own user alone
    outer = container.start(manifest, model, new_root, server.log, more, group, without=["--max-total-tokens"])
    try:
        deadline = time.monotonic() + 240
        while server.health() != 200:
            assert outer.poll() is None and time.monotonic() < deadline, server.tail()
            time.sleep(0.2)
        (main,) = psutil.Process(outer.pid).children()
        assert_is_confined(main, manifest)
        if group is not None:
            assert_fits(server, group)
        for path in manifest.probe_paths():
            with urllib.request.urlopen(server.url + path, timeout=30) as answer:
                assert answer.status == 200
        before = server.post("/generate", ASK)["output_ids"]
        assert len(set(before)) > 12
        rank = server.status()["devices"][1]["rank_pid"]
        next(child for child in main.children(recursive=True) if inner_pid(child.pid) == rank).kill()
        server.wait_serving(1)
        assert server.post("/generate", ASK)["output_ids"] == before
        assert server.status()["recoveries"][0]["cause"] == "process"
        main.send_signal(signal.SIGTERM)
        assert outer.wait(60) in (0, -signal.SIGTERM), server.tail()
        assert "Traceback" not in server.log.read_text()
    finally:
        outer.kill()
        outer.wait()


def inner_pid(pid):
    """As the process is called in its own pid namespace."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid"))
    return int(line.split()[-1])


def assert_is_confined(main, manifest):
    """Else the test would prove nothing."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{main.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == [str(manifest.pod["securityContext"]["runAsUser"])] * 4
    assert inner_pid(main.pid) == 1
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    mounts = [line.split() for line in Path(f"/proc/{main.pid}/mountinfo").read_text().splitlines()]
    assert next("ro" in fields[5].split(",") for fields in mounts if fields[4] == "/")


def assert_fits(server, group):
    """Weights are in place. KV, and its second copy after a loss, must fit beside all there is."""
    said = re.search(r"anchortp: (\d+) MiB are available \((\S+) is 3072 MiB\)", server.log.read_text())
    assert said and said[2].startswith(str(group)), server.tail()
    status = server.status()
    kv_bytes = sum(device["kv_bytes"] for device in status["devices"])
    (usage,) = [(group / n) for n in ("memory.usage_in_bytes", "memory.current") if (group / n).exists()]
    used = int(usage.read_text())
    assert used + 2 * kv_bytes <= LIMIT_BYTES
    assert kv_bytes > LIMIT_BYTES / 8, "it could be larger"


def test_the_compose_file_says_the_same(manifest):
    compose = yaml.safe_load((container.MANIFEST.parent / "compose.yaml").read_text())["services"]["anchortp"]
    security = manifest.pod["securityContext"]
    assert compose["command"] == manifest.container["args"]
    assert [f"{name}={value}" for name, value in compose["environment"].items()] == manifest.environment
    assert compose["image"] == manifest.container["image"]
    assert compose["user"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert compose["read_only"] and compose["cap_drop"] == ["ALL"]
    assert {entry.split(":")[0] for entry in compose["tmpfs"]} | {"/dev/shm"} == set(manifest.writable)
    assert compose["mem_limit"] == manifest.container["resources"]["limits"]["memory"].lower().removesuffix("i")
    assert compose["stop_grace_period"] == f"{manifest.pod['terminationGracePeriodSeconds']}s"
    assert manifest.container["livenessProbe"]["httpGet"]["path"] in compose["healthcheck"]["test"][-1]


def test_the_image_has_what_the_manifest_needs(manifest):
    lines = (container.MANIFEST.parent / "Dockerfile").read_text().splitlines()
    security = manifest.pod["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in lines
    assert 'ENTRYPOINT ["tini", "--", "python3", "-m", "anchortp_sglang.launch_server"]' in lines
    assert {volume["name"] for volume in manifest.pod["volumes"]} == {
        mount["name"] for mount in manifest.container["volumeMounts"]
    }
