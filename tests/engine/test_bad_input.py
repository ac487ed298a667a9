"""What cannot work is refused at once: exit code 2, one clear message that names it, nothing left behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import leftovers
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anchortp_sglang.anchor.rundir import prepare_run_dir
from anchortp_sglang.testing.server import free_port

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def argv(checkpoint):
    return arguments(checkpoint["qwen3"])


def arguments(model):
    return ["--model-path", str(model), "--tp-size", "2", "--max-total-tokens", "1024", "--port", str(free_port())]


def refused(forge, places, argv):
    """The launcher's message. It is the last thing on stderr, and there is no traceback."""
    done = forge.run("engine_jobs:launch", env=places, argv=argv)
    assert done.code == 2, done.output[-4000:]
    assert "Traceback" not in done.output
    return done.output[done.output.index("anchortp: cannot start: ") :]


# ---- before SGLang is imported: from the command line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--anchor-width", "2,1,1"], ["--anchor-width", "did you mean --anchor-widths"]),
        (["--anchor-widths", "2;1"], ["--anchor-widths", "N,N"]),
        (["--anchor-min-devices", "0"], ["--anchor-min-devices", "at least 1"]),
        (["--dp-size", "2"], ["--dp-size 2", "router"]),
        (["--device", "cuda"], ["--device cuda", "use --device cpu"]),
        (["--model-path", "/no/such/folder"], ["/no/such/folder", "OWNER/NAME"]),
        (["--tp-size", "many"], ["--tp-size", "'many'"]),
        (["--port", "0"], ["--port 0", "1 to 65535"]),
        (["--anchor-run-dir", "/dev/null/run"], ["/dev/null/run", "choose another"]),
        (["--config", "/no/such/file.yaml"], ["--config /no/such/file.yaml"]),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_what_needs_no_sglang_is_refused_before_it_is_imported(argv, flags, named):
    done, seconds = launched([*argv, *flags])
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) <= 2
    assert [text for text in named if text not in done.stderr] == []
    assert "importing SGLang" not in done.stderr
    assert seconds < 2


def test_a_port_in_use_is_refused_before_anything_is_loaded(argv):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        done, seconds = launched([*argv, "--port", port])
    assert done.returncode == 2
    assert f"--port {port}" in done.stderr
    assert seconds < 2


def test_a_damaged_checkpoint_is_refused_from_the_command_line(checkpoint, tmp_path):
    """The same as below, but with nothing preloaded: this is what an operator sees."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint["qwen3"], folder)
    cut_off(folder)
    done, _ = launched(arguments(folder))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"anchortp: cannot start: {second_shard(folder)} is damaged or cut off")


def launched(argv):
    began = time.monotonic()
    command = [sys.executable, "-m", "anchortp_sglang.launch_server", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - began


# ---- flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--anchor-widths", "2,1,1"], ["--anchor-widths", "3 devices", "--tp-size is 2"]),
        (["--anchor-widths", "3,3"], ["3,3", "add up to 4"]),
        (["--anchor-min-devices", "3"], ["--anchor-min-devices 3", "choose 1 to 2"]),
        (["--dp-size", "2"], ["--dp-size 2"]),
        (["--pp-size", "2"], ["--pp-size 2", "use --tp-size"]),
        (["--nnodes", "2"], ["--nnodes 2", "one machine"]),
        (["--ep-size", "2"], ["Qwen3ForCausalLM has no experts"]),
        (["--speculative-algorithm", "NEXTN"], ["--speculative-algorithm", "leave it out"]),
        (["--disaggregation-mode", "prefill"], ["--disaggregation-mode", "one server"]),
        (["--enable-lora"], ["--lora-paths", "--max-lora-rank", "--lora-target-modules"]),
        (["--lora-paths", "a=b", "--lora-backend", "triton"], ["--lora-backend triton", "torch_native"]),
        (["--lora-paths", "a=b", "--anchor-rotate-heads"], ["--enable-lora", "--anchor-rotate-heads"]),
        (["--quantization", "fp8"], ["--quantization fp8", "unquantized"]),
        (["--use-ray"], ["--use-ray"]),
        (["--kv-cache-dtype", "fp8_e5m2"], ["--kv-cache-dtype fp8_e5m2", "auto"]),
        (["--attention-backend", "triton"], ["--attention-backend triton", "torch_native"]),
        (["--host", "nowhere.invalid"], ["--host nowhere.invalid"]),
        (["--max-total-tokens", "100000000"], ["100000000 KV slots", "lower --max-total-tokens"]),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else None,
)
def test_a_flag_that_cannot_be_honoured_is_named_with_a_way_out(forge, places, argv, flags, named):
    message = refused(forge, places, [*argv, *flags])
    assert [text for text in named if text not in message] == []


def test_every_unsupported_flag_is_named_at_once(forge, places, argv):
    message = refused(forge, places, [*argv, "--use-ray", "--dp-size", "2", "--quantization", "fp8"])
    assert [flag for flag in ("--use-ray", "--dp-size", "--quantization") if flag not in message] == []


def test_flags_of_a_config_file_are_judged_like_those_of_the_command_line(forge, places, argv, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("pp-size: 2\nuse-ray: true\n")
    message = refused(forge, places, [*argv, "--config", str(config)])
    assert "--pp-size 2" in message
    assert "--use-ray" in message


# ---- checkpoints


def edited(change):
    """Damage to the one tensor file that a copy is given instead of its shards."""

    def damage(folder):
        tensors = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
            path.unlink()
        (folder / "model.safetensors.index.json").unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def configured(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def cut_off(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size // 2)


def second_shard(folder):
    return sorted(folder.glob("*.safetensors"))[1]


DAMAGE = {
    "another architecture": (configured(architectures=["GemmaForCausalLM"]), ["GemmaForCausalLM", "supported are"]),
    "quantized": (configured(quantization_config={"quant_method": "fp8"}), ["quantization_config", "unquantized"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "OWNER/NAME"]),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "copy it again"]),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")],
        ["no *.safetensors file"],
    ),
    "a shard missing": (lambda folder: second_shard(folder).unlink(), ["model-00002-of-00002", "copy"]),
    "a shard cut off": (cut_off, ["model-00002-of-00002", "cut off"]),
    "broken index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ["model.safetensors.index.json", "copy it again"],
    ),
    "a tensor missing": (edited(lambda tensors: tensors.pop(TENSOR)), [TENSOR, "has no"]),
    "a tensor of another shape": (
        edited(lambda tensors: tensors.update({TENSOR: np.ascontiguousarray(tensors[TENSOR][:-1])})),
        [TENSOR, "(767, 320)", "(768, 320)"],
    ),
    "a tensor too many": (
        edited(lambda tensors: tensors.update({"model.layers.0.odd.weight": np.zeros(3, np.float32)})),
        ["model.layers.0.odd.weight", "no place for"],
    ),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_named(forge, places, checkpoint, tmp_path, damage, named):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint["qwen3"], folder)
    damage(folder)
    message = refused(forge, places, arguments(folder))
    assert [text for text in named if text not in message] == []


@pytest.mark.parametrize(
    ("rule", "change", "named"),
    [
        ("mlp.down_proj.weight", None, "mlp.down_proj.weight"),
        ("self_attn.o_proj.weight", {"dim": 0}, "self_attn.o_proj.weight"),
        ("mlp.gate_up_proj.weight", {"sources": [["mlp.gate_proj.weight", "mlp"]]}, "mlp.up_proj.weight"),
        (
            "mlp.gate_up_proj.weight",
            {"sources": [["mlp.gate_proj.weight", "mlp"], ["mlp.gate_proj.weight", "mlp"]]},
            "mlp.up_proj.weight",
        ),
        ("self_attn.q_norm.weight", {"only_if": ["no_such_key"]}, "self_attn.q_norm.weight"),
    ],
    ids=["rule left out", "split along the other dim", "a source left out", "a source doubled", "a norm left out"],
)
def test_a_mistake_in_a_familys_table_stops_the_start(forge, places, argv, rule, change, named):
    """Nothing is ever filled by guess: SGLang's own loader would not notice some of these."""
    given = {"argv": argv, "family": "Qwen3ForCausalLM", "rule": rule, "change": change}
    done = forge.run("engine_jobs:launch_with_a_wrong_rule", env=places, **given)
    assert done.code == 2, done.output[-4000:]
    assert named in done.output[done.output.index("anchortp: cannot start: ") :]


# ---- run directories, and servers side by side


def test_a_run_directory_that_others_may_enter_is_refused(forge, places, argv, tmp_path):
    folder = tmp_path / f"run-{argv[-1]}"
    folder.mkdir()
    folder.chmod(0o755)
    message = refused(forge, places, [*argv, "--anchor-run-dir", str(tmp_path)])
    assert str(folder) in message
    assert "chmod 700" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_the_run_directory_of_another_user_is_refused(forge, places, argv, tmp_path):
    folder = tmp_path / f"run-{argv[-1]}"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    message = refused(forge, places, [*argv, "--anchor-run-dir", str(tmp_path)])
    assert "belongs to user 12345" in message


def test_a_file_in_place_of_the_run_directory_is_refused(forge, places, argv, tmp_path):
    (tmp_path / "file").touch()
    message = refused(forge, places, [*argv, "--anchor-run-dir", str(tmp_path / "file")])
    assert str(tmp_path / "file") in message


def test_the_run_directory_of_a_running_server_is_refused(forge, places, argv, tmp_path):
    prepare_run_dir(tmp_path, f"run-{argv[-1]}")  # this process is the running server
    message = refused(forge, places, [*argv, "--anchor-run-dir", str(tmp_path)])
    assert f"process {os.getpid()}" in message


def test_two_servers_run_side_by_side_and_end_without_a_trace(forge, checkpoint, places, run_base):
    """Neither is told where to put its run directory; the first one's end is nothing to the second."""
    argvs = [[*arguments(checkpoint["qwen3"]), "--dtype", "float32"] for _ in range(2)]
    jobs = [forge.start("engine_jobs:launch", env=places, argv=argv) for argv in argvs]
    for job, argv in zip(jobs, argvs, strict=True):
        wait_healthy(job, argv[argv.index("--port") + 1])
    assert len(list((run_base / "anchortp").iterdir())) == 2
    for job, others in ((jobs[0], 1), (jobs[1], 0)):
        os.kill(job.pid, 15)
        ended = job.wait(30)
        assert ended.code in (0, -15), ended.output[-4000:]
        assert len(list((run_base / "anchortp").iterdir())) == others
        if others:
            wait_healthy(jobs[1], argvs[1][argvs[1].index("--port") + 1])
        assert "Traceback" not in ended.output
    assert leftovers.wait_gone(jobs[0].pid, run_base) == leftovers.wait_gone(jobs[1].pid, run_base) == {}


def wait_healthy(job, port, timeout_s=60):

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"not healthy\n{job.output[-4000:]}")
