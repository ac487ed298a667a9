"""What the CPU settings promise: enough for SGLang to start, and never over a user's head."""

import sys

import pytest

from anchortp_sglang.platforms.base import describe
from anchortp_sglang.platforms.cpu import sgl_kernel_stub
from anchortp_sglang.platforms.cpu.environment import cpu_defaults

BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def bound_cores(bind: str) -> list[list[int]]:
    return [[int(core) for core in entry.split(",")] for entry in bind.split("|")]


@pytest.mark.parametrize(
    ("tp_size", "cores", "bind", "threads"),
    [
        (1, (0, 1), "0,1", "2"),
        (2, (0, 1), "0|1", "1"),
        (4, (0, 1), "0|1|0|1", "1"),
        (3, (4, 6), "4|6|4", "1"),
        (2, (0, 1, 2, 3, 8), "0,1|2,3", "2"),
        (3, tuple(range(8)), "0,1|2,3|4,5", "2"),
    ],
)
def test_cores_are_shared_out_to_the_ranks(tp_size, cores, bind, threads):
    env = cpu_defaults({}, {}, tp_size, cores).env
    assert env[BIND] == bind
    assert env["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize(("quota", "threads"), [(None, "16"), (8.0, "4"), (3.9, "1"), (0.5, "1"), (64.0, "16")])
def test_a_quota_of_cpu_time_bounds_the_threads_and_not_the_bindings(quota, threads):
    env = cpu_defaults({}, {}, 2, range(32), quota).env
    assert env["OMP_NUM_THREADS"] == threads
    assert env[BIND] == cpu_defaults({}, {}, 2, range(32)).env[BIND]


@pytest.mark.parametrize(("gib", "tokens"), [(3, 2048), (40, 4096), (80, 8192), (500, 16384)])
def test_a_limit_of_memory_bounds_the_chunks_of_a_prefill(gib, tokens):
    assert cpu_defaults({}, {}, 2, (0, 1), None, gib << 30).flags["chunked_prefill_size"] == tokens
    assert "chunked_prefill_size" not in cpu_defaults({}, {}, 2, (0, 1)).flags
    assert "chunked_prefill_size" not in cpu_defaults({"chunked_prefill_size": 99}, {}, 2, (0, 1), None, 1).flags


@pytest.mark.parametrize("cores", [(0, 1), tuple(range(3, 35))])
def test_bindings_hold_for_every_smaller_tp_too(cores):
    entries = bound_cores(cpu_defaults({}, {}, 8, cores).env[BIND])
    assert len(entries) == 8, "init_threads_binding takes the entry of the rank, whatever the world size"
    assert all(entry and set(entry) <= set(cores) for entry in entries)


def test_only_what_the_user_left_open_is_set():
    flags = {"device": "cpu", "attention_backend": "flex_attention", "sleep_on_idle": False}
    environ = {"OMP_NUM_THREADS": "7", "TORCHDYNAMO_DISABLE": ""}
    defaults = cpu_defaults(flags, environ, 2, (0, 1))
    assert not flags.keys() & defaults.flags.keys()
    assert not environ.keys() & defaults.env.keys()
    assert defaults.flags["disable_overlap_schedule"] is True
    assert defaults.env["SGLANG_USE_CPU_ENGINE"] == "1"


def test_the_log_line_can_be_typed_as_it_stands():
    line = describe(cpu_defaults({}, {}, 4, (0, 1)))
    assert "\n" not in line
    for piece in ("SGLANG_CPU_OMP_THREADS_BIND=0|1|0|1", "--device cpu", "--disable-overlap-schedule"):
        assert piece in line
    assert "True" not in line


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        cpu_defaults({"device": "cuda"}, {}, 2, (0, 1))


@pytest.mark.parametrize(("bind", "enough"), [("0|1|0", True), ("all", True), ("0-3|4-7", False)])
def test_a_users_bindings_must_reach_for_all_ranks(bind, enough):
    if enough:
        assert BIND not in cpu_defaults({}, {BIND: bind}, 3, (0, 1)).env
    else:
        with pytest.raises(ValueError, match="2 entries for 3 ranks"):
            cpu_defaults({}, {BIND: bind}, 3, (0, 1))


@pytest.fixture
def without_sgl_kernel(monkeypatch):
    """No sgl_kernel in this process before the test, and none after it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sgl_kernel_stub, "_real_one_loads", lambda: False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
        del sys.modules[name]


def test_the_stand_in_imports_and_names_what_was_called(without_sgl_kernel):
    sgl_kernel_stub.install()
    from sgl_kernel import rotate_input_ids_cpu
    from sgl_kernel.mamba import causal_conv1d_update_cpu

    with pytest.raises(RuntimeError, match=r"sgl_kernel\.rotate_input_ids_cpu was called"):
        rotate_input_ids_cpu(1, flag=2)
    with pytest.raises(RuntimeError, match=r"sgl_kernel\.mamba\.causal_conv1d_update_cpu was called"):
        causal_conv1d_update_cpu()


def test_the_stand_in_leaves_sglangs_own_fallbacks_alone(without_sgl_kernel):
    sgl_kernel_stub.install()
    with pytest.raises(ImportError):
        import sgl_kernel.scalar_type  # noqa: F401


def test_installing_twice_changes_nothing(without_sgl_kernel):
    sgl_kernel_stub.install()
    first = sys.modules["sgl_kernel"]
    sgl_kernel_stub.install()
    assert sys.modules["sgl_kernel"] is first


def test_a_loadable_sgl_kernel_is_left_in_place(without_sgl_kernel, monkeypatch):
    monkeypatch.setattr(sgl_kernel_stub, "_real_one_loads", lambda: True)
    sgl_kernel_stub.install()
    assert "sgl_kernel" not in sys.modules
