"""A rank's descriptors reach main where the kernel does not let it take them, and nothing upsets the rank's thread."""

import interpreter

PRELUDE = """
    import errno, fcntl, os, signal, struct, termios, threading
    from anchortp_sglang.recovery.processes import descriptors
    from anchortp_sglang.recovery.processes.pidfd import died_within, process_state
    from anchortp_sglang.recovery.processes.zygote import fork_zygote
    from no_pidfd_getfd import forbid
    from zygote_targets import hold

    zygote = fork_zygote()
    child = zygote.fork()
    child.start(hold, ("one", "two"))
    one, two, secret = child.pipe.recv()

    def fetch(number, timeout_s=20.0):
        try:
            fd = descriptors.fetch(child, number, timeout_s)
        except OSError as error:
            return str(error)
        return os.pread(fd, 99, 0).decode() or "nothing"

    def stop():
        os.kill(child.pid, signal.SIGSTOP)
        while process_state(child.pid) != "T":
            pass
"""


def run(body: str) -> list[str]:
    return interpreter.run(PRELUDE, body).splitlines()


def test_where_the_kernel_gives_descriptors_the_rank_may_be_stopped():
    assert run("""
        stop()
        print(fetch(two))
    """) == ["two"]


def test_where_the_kernel_refuses_the_rank_answers_for_its_memory_and_for_nothing_else():
    lines = run("""
        for number in (errno.EPERM, errno.ENOSYS):
            forbid(number)
            print(fetch(one), fetch(two))
        print(fetch(secret))
    """)
    assert lines[:2] == ["one two", "one two"]
    assert lines[2].startswith("pidfd_getfd: Function not implemented; asking the rank failed, too: ")
    assert lines[2].endswith("is no descriptor of its memory")


def test_what_main_never_says_is_dropped():
    assert (
        run("""
        forbid()
        for garbage in (b"x", b"GET / HTTP/1.1\\r\\n", os.urandom(64), os.urandom(99_999), bytes(99_999)):
            os.write(child.pipe.fileno(), garbage)
            while struct.unpack("i", fcntl.ioctl(child.pipe.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:
                pass  # until all of it has been read
            print(fetch(one), fetch(two))
    """)
        == ["one two"] * 5
    )


def test_a_stopped_rank_is_given_up_and_its_late_answer_is_not_taken_for_another():
    lines = run("""
        forbid()
        stop()
        before = len(os.listdir("/proc/self/fd"))
        print(fetch(one, 0.2))
        os.kill(child.pid, signal.SIGCONT)
        fd = descriptors.fetch(child, two, 20.0)
        print(os.pread(fd, 99, 0).decode(), len(os.listdir("/proc/self/fd")) - before)
    """)
    assert lines[0].endswith("asking the rank failed, too: timed out")
    assert lines[1] == "two 1", "the late descriptor was kept"


def test_a_rank_that_dies_is_not_waited_for():
    (line,) = run("""
        forbid()
        stop()
        threading.Timer(0.5, child.kill).start()
        print(fetch(one, 100.0))
    """)
    assert "the rank is dead" in line


def test_what_a_rank_says_on_its_pipe_is_left_alone():
    assert run("""
        forbid()
        print(fetch(one), fetch(two))
        print(child.pipe.recv(), child.pipe.poll())
    """) == ["one two", "last words False"]


def test_two_threads_may_ask_one_rank():
    lines = run("""
        forbid()
        def ask(number, into):
            into += [fetch(number) for _ in range(200)]
        answers = {one: [], two: []}
        threads = [threading.Thread(target=ask, args=item) for item in answers.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(set(answers[one]), set(answers[two]))
    """)
    assert lines == ["{'one'} {'two'}"]


def test_a_start_says_which_way_is_left():
    lines = run("""
        import logging, sys
        from types import SimpleNamespace
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout, force=True)
        generation = SimpleNamespace(ranks=[child], infos=[{"fds": {(0, "weights"): (one, 3)}}])
        descriptors.log_ways(generation)
        forbid()
        descriptors.log_ways(generation)
        stop()
        descriptors.log_ways(generation)
    """)
    second, none = [line for line in lines if "anchortp: " in line]
    assert second.startswith("INFO") and "its rank is asked" in second
    assert none.startswith("WARNING") and "if an anchor dies, its device is lost" in none
