"""The zygote with real processes, in an interpreter of its own (pytest has threads and must not fork)."""

import time

import interpreter

PRELUDE = """
    import os, signal, time
    from anchortp_sglang.recovery.zygote import *
    from anchortp_sglang.recovery.processes import died_within
    from zygote_targets import *
"""


def run(body: str) -> str:
    return interpreter.run(PRELUDE, body)


def test_children_become_what_they_are_told_and_die_when_killed():
    out = run("""
        zygote = fork_zygote()
        child = zygote.fork()
        child.start(answer, 41)
        print(child.pipe.recv())
        child.kill()
        print(died_within(child.pidfd, 5))
    """)
    assert out.split() == ["42", "True"]


def test_a_child_that_ends_is_reaped_so_that_no_zombie_stays():
    out = run("""
        zygote = fork_zygote()
        child = zygote.fork()
        child.start(leave, None)
        assert died_within(child.pidfd, 5)
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{child.pid}") and time.monotonic() < deadline:
            time.sleep(0.01)
        print(os.path.exists(f"/proc/{child.pid}"))
    """)
    assert out.split() == ["False"]


def test_children_die_with_their_zygote_and_it_with_main():
    out = run("""
        zygote = fork_zygote()
        children = [zygote.fork() for _ in range(2)]
        print(zygote.pid, *[child.pid for child in children], flush=True)
        os._exit(0)
    """)
    pids = [int(pid) for pid in out.split()]
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in pids)


def test_a_dead_zygote_is_reported_and_not_waited_for():
    out = run("""
        zygote = fork_zygote()
        zygote.kill()
        assert died_within(zygote.pidfd, 5)
        try:
            zygote.fork()
        except ZygoteError as error:
            print("ZygoteError", zygote.pid in [int(w) for w in str(error).replace(")", " ").split() if w.isdigit()])
    """)
    assert out.split() == ["ZygoteError", "True"]


def test_a_process_with_threads_is_unfit_to_fork():
    out = run("""
        import threading
        print(unfit_to_fork())
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        print(unfit_to_fork())
    """)
    assert out.splitlines() == ["None", "it has 2 threads"]


def test_sigint_to_the_group_does_not_end_zygote_or_children():
    out = run("""
        zygote = fork_zygote()
        child = zygote.fork()
        child.start(answer, 1)
        print(child.pipe.recv())
        for pid in (zygote.pid, child.pid):
            os.kill(pid, signal.SIGINT)
        time.sleep(0.2)
        print(died_within(zygote.pidfd, 0), died_within(child.pidfd, 0))
    """)
    assert out.split() == ["2", "False", "False"]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
