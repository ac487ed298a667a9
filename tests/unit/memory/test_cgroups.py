"""What control groups leave a process, read from made-up trees; and from a real group, where one can be made."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from anchortp_sglang.memory.cgroups import cpu_quota, memory_room

MIB = 1 << 20
HOST = 64 << 30
NO_LIMIT_V1 = 9223372036854771712
V2 = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:29 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V1_CPU = "36 31 0:30 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


@pytest.fixture
def tree(tmp_path):
    """tree(paths, mounts, files): a file system of a process in these groups."""

    def tree(paths, mounts, files):
        files = files | {"proc/self/cgroup": "\n".join(paths) + "\n", "proc/self/mountinfo": "\n".join(mounts) + "\n"}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return tree


def v2(folder, limit, used=0, high="max", **stat):
    place = f"sys/fs/cgroup/{folder}".rstrip("/")
    table = "\n".join(f"{key} {value * MIB}" for key, value in stat.items())
    limit, high = (each if each == "max" else each * MIB for each in (limit, high))
    names = {"memory.max": limit, "memory.high": high, "memory.current": used * MIB, "memory.stat": table}
    return {f"{place}/{name}": value for name, value in names.items()}


def v1(folder, limit, used=0, **stat):
    place = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    table = "\n".join(f"{key} {value * MIB}" for key, value in stat.items())
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used * MIB, "memory.stat": table}
    return {f"{place}/{name}": value for name, value in names.items()}


def room_mib(root):
    return memory_room(HOST, root).nbytes // MIB


def test_v2_the_limit_less_what_is_used_and_cannot_be_reclaimed(tree):
    used = v2("pod", 3072, 1000, active_file=100, inactive_file=200, slab_reclaimable=50, shmem=500, anon=100)
    root = tree(["0::/pod"], [V2.format(mounted="/")], used)
    room = memory_room(HOST, root)
    assert room.nbytes == (3072 - 1000 + 350) * MIB
    assert room.bound == f"{root}/sys/fs/cgroup/pod/memory.max is 3072 MiB"


def test_v2_the_nearest_to_its_limit_of_all_groups_above_counts(tree):
    files = v2("a", 8192, 7900) | v2("a/b", "max", 500) | v2("a/b/c", 4096, 500, high=1000)
    root = tree(["0::/a/b/c"], [V2.format(mounted="/")], files)
    assert room_mib(root) == 292
    (root / "sys/fs/cgroup/a/memory.max").write_text("max\n")
    assert room_mib(root) == 500


def test_v2_in_a_namespace_the_mount_is_the_container_itself(tree):
    assert room_mib(tree(["0::/"], [V2.format(mounted="/")], v2("", 3072, 72))) == 3000


@pytest.mark.parametrize("mounted", ["/docker/1", "/.."])
def test_v2_without_a_namespace_of_its_own_or_outside_of_it(tree, mounted):
    path = "/docker/1" if mounted == "/docker/1" else "/../other"
    assert room_mib(tree([f"0::{path}"], [V2.format(mounted=mounted)], v2("", 3072, 72))) == 3000


def test_v1_and_its_groups_above_that_cannot_be_seen(tree):
    paths, mounts = ["4:memory:/docker/1", "1:name=systemd:/x"], [V1.format(mounted="/docker/1")]
    used = {"total_active_file": 30, "total_inactive_file": 42}
    assert room_mib(tree(paths, mounts, v1("", 3072 * MIB, 144, **used))) == 3000
    above = used | {"hierarchical_memory_limit": 2072}
    assert room_mib(tree(paths, mounts, v1("", NO_LIMIT_V1, 144, **above))) == 2000


def test_hybrid_memory_is_v1_beside_an_empty_v2(tree):
    paths = ["4:memory:/job/inner", "0::/job"]
    files = v1("job", 2048 * MIB, 48) | v1("job/inner", NO_LIMIT_V1, 48) | {"sys/fs/cgroup/unified/job/x": ""}
    assert room_mib(tree(paths, [V1.format(mounted="/"), UNIFIED], files)) == 2000


def test_no_limit_is_the_hosts_memory(tree):
    limits = v2("pod", "max", 100) | v1("", NO_LIMIT_V1, 100)
    room = memory_room(HOST, tree(["4:memory:/", "0::/pod"], [V2.format(mounted="/"), V1.format(mounted="/")], limits))
    assert (room.nbytes, room.bound) == (HOST, "of the host's memory")


def test_more_used_than_allowed_is_no_room_at_all(tree):
    assert room_mib(tree(["0::/pod"], [V2.format(mounted="/")], v2("pod", 100, 120))) == 0


def test_what_cannot_be_read_sets_no_limit(tree, tmp_path):
    assert memory_room(HOST, tmp_path / "nothing").nbytes == HOST
    root = tree(["0::/pod/gone", "nonsense"], [V2.format(mounted="/")], v2("pod", 3072, 72))
    assert room_mib(root) == 3000
    folder = root / "sys/fs/cgroup/pod"
    (folder / "memory.stat").write_text("garbage\n")
    assert room_mib(root) == 3000
    (folder / "memory.max").unlink()
    (folder / "memory.max").mkdir()
    assert room_mib(root) == HOST // MIB


def test_a_mount_point_with_a_blank(tree):
    mount = "30 23 0:26 / /sys/fs/c\\040group rw - cgroup2 cgroup2 rw"
    files = {f"sys/fs/c group/{Path(name).name}": value for name, value in v2("", 3072, 72).items()}
    assert room_mib(tree(["0::/"], [mount], files)) == 3000


def test_cpu_quotas_of_both_versions(tree):
    files = {"sys/fs/cgroup/a/cpu.max": "150000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}
    assert cpu_quota(tree(["0::/a/b"], [V2.format(mounted="/")], files)) == 1.5
    folder = "sys/fs/cgroup/cpu,cpuacct/x"
    files = {f"{folder}/cpu.cfs_quota_us": "400000", f"{folder}/cpu.cfs_period_us": "100000"}
    root = tree(["2:cpu,cpuacct:/x", "0::/"], [V1_CPU.format(mounted="/")], files)
    assert cpu_quota(root) == 4.0
    (root / folder / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(root) is None


def test_a_real_group_is_what_a_process_in_it_is_told():
    with memory_group(300 * MIB) as group:
        code = (
            f"open('{group}/cgroup.procs', 'w').write('0')\n"
            "from anchortp_sglang.memory.cgroups import memory_room\n"
            "held = bytearray(b'x') * (100 << 20)\n"
            "print(memory_room(1 << 40).nbytes >> 20)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert 150 <= int(done.stdout) <= 200


@contextmanager
def memory_group(limit_bytes):
    """A memory group below this process's own; skips where none can be made, as without root or in most containers."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        top, name = {"memory": ("memory", "memory.limit_in_bytes"), "": ("", "memory.max")}.get(controllers, (None, ""))
        if top is None:
            continue
        group = Path("/sys/fs/cgroup", top, path.lstrip("/"), f"anchortp-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / name).exists():
                (group / name).write_text(str(limit_bytes))
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("no memory cgroup can be made here")
