"""A standby with real processes: taken once it is ready and if it fits, ended in every other case."""

import interpreter
import pytest

PRELUDE = """
    import mmap, os, signal, time
    from anchortp_sglang.recovery.processes import standby as module
    from anchortp_sglang.recovery.processes.pidfd import died_within
    from anchortp_sglang.recovery.processes.standby import Standby, Standbys
    from anchortp_sglang.recovery.processes.zygote import fork_zygote
    from standby_targets import RUN, fail, hang, stand_by
    zygote = fork_zygote()
    standbys, made = Standbys(), []
    BEGUN = ("building", "ready")  # what is begun may be ready at once

    def make(target=stand_by, number=2):
        standby = Standby(number, "weights", None, mmap.mmap(-1, 8))
        for rank in range(2):
            child = zygote.fork()
            standby.ranks.append(child)
            child.start(target, rank)
        made.append(standby)
        return standby

    def prepare(target=stand_by, number=2):
        standbys.prepare(number, "weights", lambda: make(target, number))

    def until(found, timeout_s=30):
        deadline = time.monotonic() + timeout_s
        while not found() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert found()

    def stop(pid):
        os.kill(pid, signal.SIGSTOP)
        until(lambda: open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "T")

    def becomes(state):
        until(lambda: prepare() or standbys.state == state)
"""


def run(body: str) -> str:
    return interpreter.run(PRELUDE, body)


def test_a_ready_standby_is_taken_once_and_does_what_it_is_told():
    out = run("""
        prepare()
        becomes("ready")
        assert len(made) == 1, "it was built twice"
        standby = standbys.take(2, "weights")
        for child in standby.ranks:
            child.pipe.send(RUN)
        print([child.pipe.recv() for child in standby.ranks], standbys.take(2, "weights"), standbys.state)
    """)
    assert out == "[('ready', 0), ('ready', 1)] None none\n"


@pytest.mark.parametrize(
    ("spoil", "take"),
    [
        ("", "3, 'weights'"),
        ("", "2, 'others'"),
        ("made[0].ranks[1].kill(); died_within(made[0].ranks[1].pidfd, 5)", "2, 'weights'"),
        ("stop(made[0].ranks[1].pid)", "2, 'weights'"),
    ],
    ids=["attempts failed since", "other weights", "a rank is dead", "a rank is stopped"],
)
def test_a_standby_that_is_of_no_use_is_not_taken_but_ended_later(spoil, take):
    out = run(f"""
        prepare()
        becomes("ready")
        watched = [os.pidfd_open(child.pid) for child in made[0].ranks]
        {spoil}
        began = time.monotonic()
        print(standbys.take({take}), time.monotonic() - began < 1.5)
        assert not died_within(watched[0], 0.2), "at once, beside a recovery"
        prepare(number=4)
        assert all(died_within(pidfd, 5) for pidfd in watched) and standbys.state in BEGUN
    """)
    assert out == "None True\n"


def test_a_standby_that_is_being_built_is_not_waited_for():
    out = run("""
        prepare()
        watched = os.pidfd_open(made[0].ranks[0].pid)
        print(standbys.state, standbys.take(2, "weights"))
        assert died_within(watched, 5), "it goes on building"
    """)
    assert out == "building None\n"


def test_one_that_cannot_be_built_is_tried_again_with_growing_pauses():
    out = run("""
        module._FIRST_PAUSE_S = standbys._pause_s = 0.2
        at = []
        began = time.monotonic()
        while len(made) < 4 and time.monotonic() < began + 60:
            before = len(made)
            prepare(fail)
            if len(made) > before:
                at.append(time.monotonic())
            time.sleep(0.005)
        pauses = [b - a for a, b in zip(at, at[1:])]
        assert pauses[0] > 0.2 and pauses[1] > 0.4 and pauses[2] > 0.8, pauses
        until(lambda: prepare() or standbys.state == "ready")
        print(standbys._failure or "forgotten", standbys._pause_s)
    """)
    assert out == "forgotten 0.2\n"


def test_one_that_hangs_while_it_is_built_is_ended_in_time_and_another_one_made():
    out = run("""
        module._FIRST_PAUSE_S = standbys._pause_s = 0.2
        prepare(hang)
        made[0].build_timeout_s = 0.3
        watched = os.pidfd_open(made[0].ranks[1].pid)
        until(lambda: prepare() or standbys.state == "failed")
        print(standbys.progress(2, "weights"), died_within(watched, 5))
        becomes("ready")
        print(len(made))
    """)
    assert out == "(False, 'it was not built within 0.3 s') True\n2\n"


def test_a_standby_for_another_generation_replaces_the_one_that_is_there():
    out = run("""
        prepare()
        becomes("ready")
        watched = os.pidfd_open(made[0].ranks[0].pid)
        prepare(number=3)
        assert died_within(watched, 5)
        print(len(made), made[1].number, standbys.state in BEGUN)
    """)
    assert out == "2 3 True\n"


@pytest.mark.parametrize("way", ["standbys.take(2, 'weights')", "standbys.put_aside(2)"])
def test_a_recovery_that_begins_while_a_standby_is_made_or_before_gets_none(way):
    out = run(f"""
        watched = []

        def make_and_recover():
            standby = make()
            watched.extend(os.pidfd_open(child.pid) for child in standby.ranks)
            assert {way} is None
            return standby

        standbys.prepare(2, "weights", make_and_recover)
        assert all(died_within(pidfd, 5) for pidfd in watched) and standbys.state == "none"
        prepare()  # late: its caller saw generation 1 serve
        print(len(made), standbys.state)
        prepare(number=3)
        print(len(made), standbys.state in BEGUN)
    """)
    assert out == "1 none\n2 True\n"


def test_the_progress_of_one_is_that_of_the_one_asked_for():
    out = run("""
        print(standbys.progress(2, "weights"))
        prepare(fail)
        until(lambda: standbys.progress(2, "weights")[1])
        print(standbys.progress(2, "weights")[0], standbys.progress(2, "others"))
        prepare()  # it is noticed, and the next attempt waits
        standbys.forget_failures()
        until(lambda: prepare() or standbys.progress(2, "weights")[0])
        print(standbys.progress(2, "weights"), standbys.progress(3, "weights"))
        watched = os.pidfd_open(made[-1].ranks[0].pid)
        standbys.discard()
        print(died_within(watched, 5), standbys.state)
    """)
    assert out == "(False, '')\nFalse (False, '')\n(True, '') (False, '')\nTrue none\n"


def test_whatever_keeps_one_from_being_built_is_said():
    out = run("""
        def no_anchor():
            raise RuntimeError("no anchor")

        standbys.prepare(2, "weights", no_anchor)
        print(standbys.progress(2, "weights"), standbys.state)
    """)
    assert out == "(False, 'RuntimeError: no anchor') failed\n"


def test_all_are_ended_when_the_server_gives_up():
    out = run("""
        prepare()
        becomes("ready")
        watched = [os.pidfd_open(child.pid) for child in made[0].ranks]
        standbys.put_aside(2)
        standbys.end(2)
        print(all(died_within(pidfd, 5) for pidfd in watched), standbys.state)
    """)
    assert out == "True none\n"


def test_stopped_ranks_can_be_let_go_on():
    out = run("""
        prepare()
        becomes("ready")
        pid = made[0].ranks[1].pid
        stop(pid)
        print(standbys.resume(), standbys.resume(), standbys.take(2, "weights") is made[0])
    """)
    assert out == "1 0 True\n"
