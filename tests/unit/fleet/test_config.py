"""The fleet's arguments: what is read, and what an operator is told of wrong ones."""

from pathlib import Path

import pytest
import yaml

from anchortp_sglang.fleet.config import ConfigError, read

ROOT = Path(__file__).parents[3]


def test_numbers_may_be_strings_as_on_the_command_line():
    made = read({"model_path": "/m", "tp_size": "4", "replicas": "3", "drain_s": "1.5"})
    assert (made.tp_size, made.replicas, made.drain_s) == (4, 3, 1.5)


def test_a_server_gets_a_gpu_for_each_device_or_cpus():
    assert read({"model_path": "/m", "tp_size": 4}).actor_options()["num_gpus"] == 4
    for arguments in ("--device cpu", ["--device=cpu"]):
        options = read({"model_path": "/m", "tp_size": 4, "arguments": arguments}).actor_options()
        assert (options["num_gpus"], options["num_cpus"]) == (0, 4)


def test_flags_of_the_servers_that_count_for_the_fleet_are_read_in_both_forms():
    made = read({"model_path": "/m", "arguments": "--anchor-max-body-mib 2 --api-key=a --api-key b"})
    assert (made.max_body_bytes, made.flag("--api-key"), made.flag("--device")) == (2 * 2**20, "b", None)
    assert read({"model_path": "/m"}).max_body_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "model_path"),
        ({"model_path": "/m", "tp": 4}, "`tp`"),
        ({"model_path": "/m", "replicas": 0}, "replicas is at least 1"),
        ({"model_path": "/m", "replicas": "many"}, "replicas"),
        ({"model_path": "/m", "arguments": "--nnodes 2"}, "--nnodes"),
        ({"model_path": "/m", "arguments": ["--port=1"]}, "--port"),
        ({"model_path": "/m", "autoscale": {"min": 3, "max": 2}}, "min <= max"),
        ({"model_path": "/m", "autoscale": {"target": 3}}, "`target`"),
    ],
)
def test_what_no_fleet_can_be_made_of_is_refused_with_the_reason(args, said):
    with pytest.raises(ConfigError, match=said):
        read(args)


@pytest.mark.parametrize("file", ["fleet.yaml", "fleet-kuberay.yaml"])
def test_the_launch_files_are_of_a_fleet(file):
    made = yaml.safe_load((ROOT / "launch" / file).read_text())
    serve = made if "applications" in made else yaml.safe_load(made["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    assert application["import_path"] == "anchortp_sglang.fleet.app:build"
    assert read(application["args"]).replicas == 2
