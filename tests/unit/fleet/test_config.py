"""The fleet's arguments: what is read, and what an operator is told of wrong ones."""

import pytest

from anchortp_sglang.fleet.config import ConfigError, read


def test_numbers_may_be_strings_as_on_the_command_line():
    made = read({"model_path": "/m", "tp_size": "4", "replicas": "3", "drain_s": "1.5"})
    assert (made.tp_size, made.replicas, made.drain_s) == (4, 3, 1.5)


def test_a_server_gets_a_gpu_for_each_device_or_cpus():
    assert read({"model_path": "/m", "tp_size": 4}).actor_options()["num_gpus"] == 4
    for arguments in ("--device cpu", ["--device=cpu"]):
        options = read({"model_path": "/m", "tp_size": 4, "arguments": arguments}).actor_options()
        assert (options["num_gpus"], options["num_cpus"]) == (0, 4)


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
