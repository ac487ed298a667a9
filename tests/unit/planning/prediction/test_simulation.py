"""The predicted recovery: its stages add up, moving hides behind what runs beside it, restart pays for everything."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchortp_sglang.planning.placement.migration_types import Transfer
from anchortp_sglang.planning.prediction.presets import MACHINES, machine
from anchortp_sglang.planning.prediction.schedule import schedule
from anchortp_sglang.planning.prediction.simulation import predict_recovery, predict_restart
from anchortp_sglang.planning.prediction.topology import RecoveryTimes

LAYERS = 4
TIMES = RecoveryTimes(
    detect_s=0.1,
    fence_s=0.2,
    plan_s=0.3,
    fork_s=0.4,
    groups_s=1.0,
    bind_layer_s=0.25,
    first_token_s=0.5,
    graphs_s=8.0,
    process_start_s=20.0,
)
BEFORE_MOVING_S = 1.0
BIND_S = LAYERS * TIMES.bind_layer_s
MACHINE = replace(
    machine("8xH100-NVLink", 4),
    storage_bytes_per_s=1e9,
    host_link_bytes_per_s=(10e9,) * 4,
    host_memory_bytes_per_s=1e12,
    device_copy_bytes_per_s=(1e12,) * 4,
    transfer_latency_s=0.0,
    times=TIMES,
)


def reloads(gigabytes):
    """As many for each layer, from storage at 1 GB/s."""
    return [
        Transfer("reload", 0, None, "mlp", layer, layer + 1, ((0, 1),), int(gigabytes * 1e9 / LAYERS))
        for layer in range(LAYERS)
    ]


def recovery(transfers, topology=MACHINE, kept_bytes=None):
    return predict_recovery(topology, schedule(topology, transfers), LAYERS, kept_bytes or {})


def ends(prediction):
    return {stage.name: stage.end_s for stage in prediction.stages}


def test_with_nothing_to_move_the_stages_add_up():
    predicted = recovery([])
    assert predicted.tfs_s == pytest.approx(BEFORE_MOVING_S + TIMES.groups_s + BIND_S + TIMES.first_token_s)
    assert predicted.full_speed_s == pytest.approx(predicted.tfs_s + TIMES.graphs_s)
    assert predicted.moving_from_s == pytest.approx(BEFORE_MOVING_S)


def test_what_moves_while_the_groups_form_costs_nothing():
    assert recovery(reloads(1.0)).tfs_s == pytest.approx(recovery([]).tfs_s)


def test_a_long_move_hides_all_binding_but_that_of_the_last_layer():
    predicted = recovery(reloads(8.0))
    assert ends(predicted)["bytes moved"] == pytest.approx(BEFORE_MOVING_S + 8.0)
    assert predicted.tfs_s == pytest.approx(BEFORE_MOVING_S + 8.0 + TIMES.bind_layer_s + TIMES.first_token_s)


def test_a_late_layer_does_not_hold_up_the_binding_of_earlier_ones():
    only_last = [replace(reloads(1.0)[-1], nbytes=3 * 10**9)]
    predicted = recovery(only_last)
    assert predicted.tfs_s == pytest.approx(BEFORE_MOVING_S + 3.0 + TIMES.bind_layer_s + TIMES.first_token_s)


def test_what_lies_outside_of_the_layers_must_be_there_too():
    head = replace(reloads(1.0)[-1], layer=None, stage=LAYERS + 1, nbytes=9 * 10**9)
    assert recovery([head]).tfs_s == pytest.approx(BEFORE_MOVING_S + 9.0 + TIMES.first_token_s)


def test_a_device_that_copies_what_it_keeps_slowly_is_waited_for():
    slow = replace(MACHINE, device_copy_bytes_per_s=(1e9, 1e9, 1e12, 1e12))
    predicted = recovery([], slow, kept_bytes={1: 7 * 10**9, 3: 9 * 10**9})
    assert predicted.tfs_s == pytest.approx(BEFORE_MOVING_S + 7.0 + TIMES.first_token_s)


@given(st.floats(0, 100), st.floats(0, 100))
def test_more_bytes_never_make_a_recovery_shorter(some, more):
    less, most = sorted((some, more))
    assert recovery(reloads(less)).tfs_s <= recovery(reloads(most)).tfs_s + 1e-9


@given(st.floats(0, 50))
def test_stages_follow_one_another_and_tfs_is_the_end_of_the_first_token(gigabytes):
    predicted = recovery(reloads(gigabytes))
    at = ends(predicted)
    order = ("detected", "fenced", "planned", "forked", "groups ready", "bound", "first token", "graphs")
    assert [at[name] for name in order] == sorted(at[name] for name in order)
    assert at["bytes moved"] <= at["bound"]
    assert at["first token"] == predicted.tfs_s
    assert at["graphs"] == predicted.full_speed_s
    assert all(0 <= stage.start_s <= stage.end_s for stage in predicted.stages)


@pytest.mark.parametrize(
    ("changes", "load_s"),
    [
        ({}, 40.0),  # the checkpoint, from storage
        ({"storage_bytes_per_s": 1e12}, 1.2),  # the fullest device's host link
        ({"storage_bytes_per_s": 1e12, "host_memory_bytes_per_s": 4e9}, 10.5),  # what is replicated passes twice
    ],
)
def test_a_restart_loads_everything_through_the_narrowest_place(changes, load_s):
    predicted = predict_restart(
        replace(MACHINE, **changes), {0: 10 * 10**9, 1: 10 * 10**9, 2: 10 * 10**9, 3: 12 * 10**9}, 40 * 10**9
    )
    others = 0.1 + 0.2 + 20.0 + 1.0 + 8.0 + 0.5
    assert predicted.tfs_s == pytest.approx(others + load_s)
    assert ends(predicted)["first token"] == predicted.tfs_s == predicted.full_speed_s


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_a_restart_never_beats_a_recovery_that_reloads_a_part(name):
    topology = machine(name, 4)
    weights = dict.fromkeys(range(1, 4), 10 * 10**9)
    transfers = [replace(transfer, device=1 + n % 3) for n, transfer in enumerate(reloads(10.0))]
    timeline = schedule(topology, transfers)
    recovered = predict_recovery(topology, timeline, LAYERS, weights)
    assert recovered.tfs_s < predict_restart(topology, weights, 30 * 10**9).tfs_s
