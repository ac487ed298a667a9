"""The zygote with real processes, in a process of its own (pytest has threads and must not fork)."""

import signal
import time

import interpreter

from anchortp_sglang.recovery.processes.exits import Exits

PRELUDE = """
    import os, signal, time
    from anchortp_sglang.recovery.processes.exits import Exits
    from anchortp_sglang.recovery.processes.zygote import *
    from anchortp_sglang.recovery.processes.zygote_loop import announce, serve
    from anchortp_sglang.recovery.processes.pidfd import died_within
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


def test_a_stopped_zygote_is_found_in_time_and_its_late_answers_are_no_others():
    out = run("""
        zygote = fork_zygote()
        print(zygote.answers())
        os.kill(zygote.pid, signal.SIGSTOP)
        began = time.monotonic()
        for _ in range(2):
            try:
                zygote.fork()
            except ZygoteError:
                print("ZygoteError", time.monotonic() - began < 6)
        print(zygote.answers())
        os.kill(zygote.pid, signal.SIGCONT)
        child = zygote.fork()
        child.start(answer, 41)
        print(child.pipe.recv(), zygote.answers())
        def children():
            return open(f"/proc/{zygote.pid}/task/{zygote.pid}/children").read().split()
        deadline = time.monotonic() + 5
        while children() != [str(child.pid)] and time.monotonic() < deadline:
            time.sleep(0.01)
        print(children() == [str(child.pid)])
    """)
    assert out.splitlines() == ["True", "ZygoteError True", "ZygoteError True", "False", "42 True", "True"]


def test_a_stopped_child_that_does_not_read_what_it_is_told_is_given_up():
    out = run("""
        zygote = fork_zygote()
        child = zygote.fork()
        os.kill(child.pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            child.start(answer, b"x" * 10_000_000)
        except ZygoteError:
            print("ZygoteError", time.monotonic() - began < 10)
        child.kill()  # it may have been stopped before it asked to die with the zygote
    """)
    assert out.split() == ["ZygoteError", "True"]


def test_the_reserve_takes_over_from_a_stopped_zygote_which_may_come_back():
    """Its children live on: nothing of theirs is to be interrupted."""
    out = run("""
        from anchortp_sglang.recovery.processes.zygotes import Zygotes
        first, second = fork_zygote(), fork_zygote()
        zygotes = Zygotes(first, second)
        kept = zygotes.fork()
        kept.start(answer, 1)
        os.kill(first.pid, signal.SIGSTOP)
        child = zygotes.fork()
        child.start(answer, 41)
        def parent(pid):
            return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
        print(child.pipe.recv(), parent(child.pid) == second.pid, kept.pipe.recv())
        os.kill(first.pid, signal.SIGCONT)
        zygotes.renew()  # would take an interpreter with SGLang otherwise
        print(zygotes._reserve is first, zygotes._aside)
        zygotes.kill()
        print(died_within(kept.pidfd, 5), died_within(child.pidfd, 5))
    """)
    assert out.splitlines() == ["42 True 2", "True []", "True True"]


def test_a_stopped_zygote_is_killed_once_its_children_are_dead():
    out = run("""
        import anchortp_sglang.recovery.processes.zygotes as module
        module.spawn_zygote = fork_zygote
        first, second = fork_zygote(), fork_zygote()
        pidfd = os.pidfd_open(first.pid)
        zygotes = module.Zygotes(first, second)
        kept = zygotes.fork()
        os.kill(first.pid, signal.SIGSTOP)
        zygotes.renew()
        print(died_within(kept.pidfd, 0.2), zygotes._current is second)
        kept.kill()
        assert died_within(kept.pidfd, 5)
        zygotes.renew()
        print(died_within(pidfd, 5))
    """)
    assert out.splitlines() == ["False True", "True"]


def test_a_spawned_zygote_is_waited_for_until_it_says_that_it_is_ready():
    out = run("""
        import socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            ours.close()
            time.sleep(3)  # it imports
            announce(theirs)
            serve(theirs, Exits())
        theirs.close()
        zygote = Zygote(pid, ours, 60.0)
        began = time.monotonic()
        print(zygote.answers(), time.monotonic() - began < 1)
        child = zygote.fork()
        print(time.monotonic() - began > 2.5)
        child.start(answer, 41)
        print(child.pipe.recv(), zygote.answers())
        os.kill(pid, signal.SIGSTOP)
        print(zygote.answers(), time.monotonic() - began < 30)
        zygote.kill()
    """)
    assert out.splitlines() == ["True True", "True", "42 True", "False True"]


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


def test_a_crash_of_a_child_is_told_from_a_kill():
    out = run("""
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # tvm_ffi's handler allocates: it may die of a SIGABRT instead
        zygote = fork_zygote()
        for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
            child = zygote.fork()
            os.kill(child.pid, number)
            assert died_within(child.pidfd, 5)
            print([child.crash()])
    """)
    assert out.splitlines() == ["['SIGSEGV']", "['SIGABRT']", "['']"]


def test_exits_remember_a_thousand_children():
    exits = Exits()
    for pid in range(1, 1501):
        exits.note(pid, signal.SIGSEGV)
    assert [exits.crash_of(pid) for pid in (1500, 1000, 1)] == ["SIGSEGV", "SIGSEGV", ""]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_level_that_is_set_already_touches_no_logger():
    out = interpreter.run(
        "import logging; from anchortp_sglang.recovery.processes.zygote_loop import share_loggers",
        """
        share_loggers()
        share_loggers()
        cleared = []
        logging.root.manager._clear_cache = lambda: cleared.append(True)
        log = logging.getLogger("a logger of this test")
        for level in (logging.INFO, "INFO", logging.INFO, "WARNING", 30, "INFO"):
            log.setLevel(level)
        print(len(cleared), log.level)
        try:
            log.setLevel("NONE OF THEM")
        except ValueError as error:
            print(error)
        """,
    )
    assert out == "3 20\nUnknown level: 'NONE OF THEM'\n"
