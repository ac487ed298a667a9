"""Spare ranks with real processes: in their group when they are told what to be, or out of it if it is of no use."""

import interpreter

PRELUDE = """
    import os, time
    from anchortp_sglang.recovery.processes.pidfd import died_within
    from anchortp_sglang.recovery.processes.spares import Spares
    from anchortp_sglang.recovery.processes.zygote import fork_zygote
    from group_targets import all_reduce
    zygote = fork_zygote()

    def prepared(world_size, joining=True):
        spares = Spares()
        spares.prepare(zygote.fork, world_size, joining, None)
        deadline = time.monotonic() + 60
        while not all(child.pipe.poll() for child in spares._children) and time.monotonic() < deadline:
            time.sleep(0.01)
        return spares, list(spares._children)

    def sums(ranks, store):
        for rank, child in enumerate(ranks):
            child.start(all_reduce, (rank, len(ranks), store.port))
        return [child.pipe.recv() for child in ranks]
"""


def run(body: str) -> str:
    return interpreter.run(PRELUDE, body)


def test_a_generation_as_wide_takes_all_spares_in_the_group_that_they_have_joined():
    out = run("""
        spares, children = prepared(3)
        at = spares._store.port
        ranks, store = spares.take(3)
        assert ranks == children and store.port == at
        print(*sums(ranks, store))
    """)
    assert out == "(3, 'joined before') (3, 'joined before') (3, 'joined before')\n"


def test_a_narrower_generation_takes_some_which_join_anew():
    out = run("""
        spares, children = prepared(3)
        left_over = os.pidfd_open(children[2].pid)
        ranks, store = spares.take(2)
        assert ranks == children[:2] and died_within(left_over, 5)
        print(*sums(ranks, store))
    """)
    assert out == "(2, 'joined now') (2, 'joined now')\n"


def test_a_wider_generation_or_one_with_a_dead_spare_is_filled_up_with_others():
    out = run("""
        spares, children = prepared(3)
        children[1].kill()
        assert died_within(children[1].pidfd, 5)
        ranks, store = spares.take(3)
        assert ranks == [children[0], children[2]]
        print(*sums([*ranks, zygote.fork()], store))
    """)
    assert out == "(3, 'joined now') (3, 'joined now') (3, 'joined now')\n"


def test_spares_that_are_not_ready_are_not_waited_for():
    out = run("""
        spares = Spares()
        spares.prepare(zygote.fork, 2, True, None)
        print(len(spares.take(2)[0]), len(spares.take(2)[0]))
    """)
    assert out == "0 0\n"


def test_without_a_group_spares_meet_in_the_generations_own():
    out = run("""
        spares, children = prepared(2, joining=False)
        ranks, store = spares.take(2)
        assert ranks == children
        print(*sums(ranks, store))
    """)
    assert out == "(2, 'joined now') (2, 'joined now')\n"


def test_neither_store_nor_group_listens_but_on_loopback():
    out = run("""
        import psutil
        os.environ["GLOO_SOCKET_IFNAME"] = "some-other"
        zygote = fork_zygote()
        spares, children = prepared(2)
        for pid in (os.getpid(), children[0].pid, children[1].pid):
            print({c.laddr.ip for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN"})
    """)
    assert out == "{'127.0.0.1'}\n" * 3


def test_garbage_on_the_sockets_of_store_and_group_disturbs_nobody():
    out = run("""
        import psutil, socket
        spares, children = prepared(2)
        listeners = [
            connection.laddr
            for pid in (os.getpid(), children[0].pid, children[1].pid)
            for connection in psutil.Process(pid).net_connections("tcp") if connection.status == "LISTEN"
        ]
        assert len(listeners) == 3
        for garbage in (b"", b"x", b"GET / HTTP/1.1\\r\\n\\r\\n", bytes(64), b"\\xff" * 64, os.urandom(99_999)):
            for address in listeners:
                with socket.create_connection(address) as sock:
                    try:
                        sock.sendall(garbage)
                    except OSError:
                        pass  # hung up on
        silent = [socket.create_connection(address) for address in listeners]
        ranks, store = spares.take(2)
        print(*sums(ranks, store))
    """)
    assert out == "(2, 'joined before') (2, 'joined before')\n"


def test_a_second_call_forks_nothing_unless_a_spare_has_died():
    out = run("""
        spares, children = prepared(2)
        spares.prepare(zygote.fork, 2, True, None)
        print(spares._children == children)
        children[0].kill()
        assert died_within(children[0].pidfd, 5)
        spares.prepare(zygote.fork, 2, True, None)
        print(any(child in children for child in spares._children), len(spares._children))
    """)
    assert out.split() == ["True", "False", "2"]


def test_a_stopped_spare_is_found_at_once_and_the_others_leave_its_group():
    out = run("""
        import signal
        spares, children = prepared(3)
        stopped = os.pidfd_open(children[1].pid)
        os.kill(children[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        ranks, store = spares.take(3)
        assert time.monotonic() - began < 1.5
        assert ranks == [children[0], children[2]] and died_within(stopped, 5)
        print(*sums([*ranks, zygote.fork()], store))
    """)
    assert out == "(3, 'joined now') (3, 'joined now') (3, 'joined now')\n"


def test_a_stopped_spare_can_be_let_go_on():
    out = run("""
        import signal
        spares, children = prepared(2)
        os.kill(children[1].pid, signal.SIGSTOP)
        while open(f"/proc/{children[1].pid}/stat").read().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        print(spares.resume(), spares.resume(), spares.take(2)[0] == children)
    """)
    assert out.split() == ["1", "0", "True"]
