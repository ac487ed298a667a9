"""``anchortp plan``: answers that add up, in JSON as documented, and bad input refused by the name of the field."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image
from places import CONFIGS
from topology_json import topology_to_json
from typer.testing import CliRunner

from anchortp_sglang.cli.app import app
from anchortp_sglang.planning.prediction.presets import machine
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint
from anchortp_sglang.testing.tiny_families import FAMILIES as TINY_FAMILIES

LLAMA = CONFIGS / "llama-3.1-70b.json"
KEYS = [
    "strategy",
    "reload_bytes",
    "reload_lower_bound_bytes",
    "p2p_bytes",
    "makespan_s",
    "link_lower_bound_s",
    "sharded_bytes",
    "devices",
    "timeline",
    "kv_tokens",
    "kv_tokens_alike",
    "predicted_tfs_s",
    "restart_tfs_s",
]
DEVICE_KEYS = [
    "id",
    "kept_bytes",
    "p2p_in_bytes",
    "p2p_out_bytes",
    "reload_bytes",
    "weight_bytes",
    "kv_bytes_per_token",
]
ENTRY_KEYS = ["device", "kind", "layer", "start_s", "end_s", "bytes"]


def run(*arguments, model=LLAMA, devices=8):
    command = ["plan", "--model", str(model), "--devices", str(devices), *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1"}).invoke(app, command)


def answer(*arguments, **options):
    done = run(*arguments, "--json", **options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def assert_adds_up(found):
    assert found["reload_bytes"] == sum(device["reload_bytes"] for device in found["devices"])
    assert found["p2p_bytes"] == sum(device["p2p_in_bytes"] for device in found["devices"])
    assert found["p2p_bytes"] == sum(device["p2p_out_bytes"] for device in found["devices"])
    for device in found["devices"]:
        arriving = device["kept_bytes"] + device["p2p_in_bytes"] + device["reload_bytes"]
        assert arriving == device["weight_bytes"]
        for kind, key in (("p2p", "p2p_in_bytes"), ("reload", "reload_bytes")):
            moved = (e["bytes"] for e in found["timeline"] if (e["device"], e["kind"]) == (device["id"], kind))
            assert sum(moved) == device[key]
    assert max((entry["end_s"] for entry in found["timeline"]), default=0.0) == found["makespan_s"]
    assert found["link_lower_bound_s"] <= found["makespan_s"]
    assert found["reload_bytes"] == found["reload_lower_bound_bytes"]


@pytest.mark.parametrize("strategy", ["auto", "contiguous", "adopt"])
def test_the_json_has_the_documented_keys_and_adds_up(strategy):
    found = answer("--lose", 3, "--strategy", strategy)
    assert list(found) == KEYS
    assert all(list(device) == DEVICE_KEYS for device in found["devices"])
    assert all(list(entry) == ENTRY_KEYS for entry in found["timeline"])
    assert found["strategy"] == strategy or strategy == "auto"
    assert [device["id"] for device in found["devices"]] == [0, 1, 2, 4, 5, 6, 7]
    assert {entry["layer"] for entry in found["timeline"]} == {None, *range(80)}
    assert_adds_up(found)


def test_the_kv_capacity_that_rotating_heads_gain_is_told():
    """8 KV heads on 7 devices: at most 8/7 in a layer on average, or 2 in every layer."""
    found = answer("--lose", 3)
    room = int(0.88 * 80e9)
    per_head = 2 * 128 * 2 * 80
    assert found["kv_tokens"] == pytest.approx((room - 20.18e9) / (8 / 7 * per_head), rel=0.01)
    assert found["kv_tokens_alike"] == pytest.approx((room - 22.56e9) / (2 * per_head), rel=0.01)
    told = run("--lose", 3).output
    assert f"{found['kv_tokens_alike']:,} if heads and experts did not rotate" in " ".join(told.split())


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("experts", ["tp", "ep"])
def test_every_named_model_is_planned_for(config, experts):
    devices = 8 if config.stem == "mixtral-8x22b" else 10  # it has 8 experts; DeepSeek-V3 needs more than 8 devices
    topology = ("--topology", "8xH20-NVLink", "--mem-fraction-static", "1")
    found = answer("--lose", 2, "--experts", experts, *topology, model=config, devices=devices)
    assert_adds_up(found)
    assert found["predicted_tfs_s"] < found["restart_tfs_s"]


def test_adopt_moves_nothing_between_devices_and_contiguous_does():
    assert answer("--lose", 3, "--strategy", "adopt")["p2p_bytes"] == 0
    assert answer("--lose", 3, "--strategy", "contiguous")["p2p_bytes"] > 0


def test_auto_takes_the_strategy_that_is_done_first():
    for topology in ("8xH100-NVLink", "8xA100-PCIe"):
        options = ("--lose", 0, "--topology", topology)
        each = {name: answer(*options, "--strategy", name)["makespan_s"] for name in ("contiguous", "adopt")}
        assert answer(*options)["makespan_s"] == pytest.approx(min(each.values()))


def test_with_fast_storage_adopt_is_done_first_as_it_reloads_over_all_host_links(tmp_path):
    file = tmp_path / "machine.json"
    file.write_text(topology_to_json(replace(machine("8xA100-PCIe"), storage_bytes_per_s=1e12)))
    options = ("--lose", 3, "--topology", file)
    each = {name: answer(*options, "--strategy", name)["makespan_s"] for name in ("contiguous", "adopt")}
    assert each["adopt"] < 0.5 * each["contiguous"]
    assert answer(*options)["strategy"] == "adopt"


def test_losses_and_a_return_are_answered_one_after_another():
    found = answer("--lose", "3", "--then", "5", "--rejoin", "3")
    assert list(found) == [*KEYS, "steps"]
    assert [[device["id"] for device in step["devices"]] for step in found["steps"]] == [
        [0, 1, 2, 4, 5, 6, 7],
        [0, 1, 2, 4, 6, 7],
        [0, 1, 2, 3, 4, 6, 7],
    ]
    for step in found["steps"]:
        assert_adds_up(step)
    assert found["reload_bytes"] == found["steps"][-1]["reload_bytes"]


@pytest.mark.parametrize("lose", [["--lose", "3,5"], ["--lose", "3", "--lose", "5"], ["--lose", " 3, 5"]])
def test_devices_are_lost_together_however_they_are_named(lose):
    found = answer(*lose)
    assert [device["id"] for device in found["devices"]] == [0, 1, 2, 4, 6, 7]
    assert "steps" not in found


def test_a_device_that_was_never_there_can_join():
    found = answer("--rejoin", 8)
    assert [device["id"] for device in found["devices"]] == list(range(9))
    assert found["devices"][8]["kept_bytes"] == 0


def test_the_tables_tell_what_the_json_does():
    done = run("--lose", 3, "--then", 5)
    assert done.exit_code == 0
    for told in (
        "device 3 lost",
        "device 5 lost",
        "P2P in",
        "KV tokens",
        "strategy",
        "first token",
        "restart and reload",
    ):
        assert told in done.output
    assert done.output.count("predicted recovery") == 2


def test_all_failures_tries_each_device():
    found = answer("--all-failures", devices=4, model=CONFIGS / "qwen3-30b-a3b.json")
    assert [one["lost"] for one in found] == [[0], [1], [2], [3]]
    for one in found:
        assert list(one) == ["lost", *KEYS]
        assert_adds_up(one)
    done = run("--all-failures", devices=4, model=CONFIGS / "qwen3-30b-a3b.json")
    assert done.exit_code == 0
    assert [line.split()[1] for line in done.output.splitlines() if " s " in line and "│" in line] == list("0123")


def test_a_plan_that_does_not_fit_is_explained():
    done = run("--lose", 3, "--topology", "4xL40S-PCIe", devices=4)
    assert done.exit_code == 1
    assert "bytes" in done.output
    done = run("--all-failures", "--topology", "4xL40S-PCIe", devices=4)
    assert done.exit_code == 1
    assert "none" in done.output


@pytest.mark.parametrize("name", ["out.png", "out.svg"])
def test_the_plot_is_drawn(tmp_path, name):
    path = tmp_path / name
    assert run("--lose", 3, "--plot", path).exit_code == 0
    if name.endswith("png"):
        with Image.open(path) as image:
            assert image.width > 1000
    else:
        assert "device 2: reload" in path.read_text()


def test_a_checkpoint_folder_and_a_topology_file_will_do(tmp_path):
    (tmp_path / "config.json").write_text(LLAMA.read_text())
    file = tmp_path / "machine.json"
    file.write_text(topology_to_json(machine("8xH100-NVLink")))
    assert answer("--lose", 3, "--topology", file, model=tmp_path) == answer("--lose", 3)


@pytest.mark.parametrize("experts", ["tp", "ep"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_checkpoint_of_every_family_is_planned_for(tmp_path, family, experts):
    write_checkpoint(tmp_path, family, num_layers=2, shards=2)
    found = answer("--lose", 1, "--experts", experts, "--topology", "cpu", model=tmp_path, devices=3)
    assert_adds_up(found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda names: names.pop("model.norm.weight"), "the checkpoint has no model.norm.weight"),
        (lambda names: names.update({"model.layers.0.odd.weight": "a"}), "no place for: model.layers.0.odd.weight"),
        (lambda names: names.update({"v_head.summary.weight": "a"}), None),
    ],
)
def test_an_index_that_does_not_fit_is_refused_by_the_tensors_name(tmp_path, change, told):
    write_checkpoint(tmp_path, "olmo2", num_layers=2, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    done = run("--lose", 1, "--topology", "cpu", model=tmp_path, devices=3)
    assert (done.exit_code, told is None or told in " ".join(done.output.split())) == (2 if told else 0, True)
    path.write_text("{}")
    assert "has no weight_map" in run("--lose", 1, model=tmp_path, devices=3).output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--lose"),
        (["--lose", "8"], "--lose: device 8 is none of the devices 0 to 7"),
        (["--lose", "3,3"], "--lose: device 3 is lost already"),
        (["--lose", "3", "--then", "3"], "--then: device 3 is lost already"),
        (["--lose", "x"], "--lose: 'x' is no device id"),
        (["--lose", "-1"], "--lose"),
        (["--lose", "0,1,2,3,4,5,6,7"], "--lose: no device is left"),
        (["--rejoin", "3"], "--rejoin: device 3 is there already"),
        (["--rejoin", "999999999"], "--devices: ids go up to 4095"),
        (["--all-failures", "--lose", "3"], "--all-failures"),
        (["--all-failures", "--plot", "x.png"], "--plot"),
        (["--lose", "3", "--plot", "x.gif"], "--plot"),
        (["--lose", "3", "--plot", "no/such/folder/x.svg"], "--plot"),
        (["--lose", "3", "--topology", "9xB200"], "topology: '9xB200' is none of"),
        (["--lose", "3", "--topology", "missing.json"], "--topology"),
        (["--lose", "3", "--dtype", "int3"], "dtype"),
        (["--lose", "3", "--mem-fraction-static", "1.5"], "--mem-fraction-static"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, told):
    done = run(*arguments)
    assert done.exit_code == 2
    assert told in done.output


@pytest.mark.parametrize("devices", [0, -3])
def test_no_devices_are_refused(devices):
    done = run("--lose", 0, devices=devices)
    assert (done.exit_code, "--devices" in done.output) == (2, True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ("{}", "architectures"),
        ('{"architectures": ["MambaForCausalLM"]}', "MambaForCausalLM"),
        (json.dumps(json.loads(LLAMA.read_text()) | {"hidden_size": -1}), "hidden_size"),
        (json.dumps(json.loads(LLAMA.read_text()) | {"num_hidden_layers": None}), "num_hidden_layers"),
    ],
)
def test_a_bad_config_is_refused_by_its_field(tmp_path, text, told):
    path = tmp_path / "config.json"
    path.write_text(text)
    done = run("--lose", 3, model=path)
    assert (done.exit_code, told in done.output) == (2, True), done.output
    assert run("--lose", 3, model=tmp_path / "nothing.json").exit_code == 2


def test_a_bad_topology_file_is_refused_by_its_field(tmp_path):
    path = tmp_path / "machine.json"
    value = json.loads(topology_to_json(machine("8xH100-NVLink")))
    for changes, told in (
        ({"p2p_link_bytes_per_s": {"0-1": 1e9}}, "p2p_link_bytes_per_s: no link between"),
        ({"storage_bytes_per_s": -5}, "storage_bytes_per_s: must be greater than zero"),
    ):
        path.write_text(json.dumps(value | changes))
        done = run("--lose", 3, "--topology", path)
        assert (done.exit_code, told in done.output) == (2, True)


def test_neither_torch_nor_sglang_nor_pillow_is_imported():
    code = (
        "import sys; from anchortp_sglang.cli.app import app; "
        f"app(['plan', '--model', {str(LLAMA)!r}, '--devices', '8', '--lose', '3'], standalone_mode=False); "
        "assert not {'torch', 'sglang', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
