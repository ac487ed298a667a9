"""Which zygote forks when one is dead, silent, or the kernel forks nothing."""

import os

import pytest

from anchortp_sglang.recovery.processes import zygotes as module
from anchortp_sglang.recovery.processes.zygote import ForkFailed, ZygoteError
from anchortp_sglang.recovery.processes.zygotes import Zygotes


class Zygote:
    """Stands where a zygote does: forks, or fails with ``error``; its process is this one."""

    importing = False

    def __init__(self, error=None):
        self.pid, self.pidfd, self.error, self.closed = os.getpid(), os.pidfd_open(os.getpid()), error, False

    def fork(self):
        if self.error is not None:
            raise self.error
        return self

    def answers(self):
        return self.error is None

    def kill(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def spawned(monkeypatch):
    """Zygotes that were spawned; put an exception in ``fails`` to make that fail."""
    made, fails = [], []

    def spawn():
        if fails:
            raise fails[0]
        made.append(Zygote())
        return made[-1]

    monkeypatch.setattr(module, "spawn_zygote", spawn)
    made_and_fails = type("Spawned", (), {"made": made, "fails": fails})
    return made_and_fails


def test_the_one_in_reserve_takes_over_from_one_that_is_silent(spawned):
    silent, reserve = Zygote(ZygoteError("silent")), Zygote()
    assert Zygotes(silent, reserve).fork() is reserve and spawned.made == []


def test_a_kernel_that_forks_nothing_costs_no_zygote(spawned):
    full, reserve = Zygote(ForkFailed("EAGAIN")), Zygote()
    zygotes = Zygotes(full, reserve)
    with pytest.raises(ForkFailed):
        zygotes.fork()
    full.error = None
    assert zygotes.fork() is full


def test_a_zygote_that_cannot_be_spawned_now_is_spawned_later_and_nothing_is_put_aside_twice(spawned):
    silent = Zygote(ZygoteError("silent"))
    zygotes = Zygotes(silent, None)
    spawned.fails.append(OSError("EAGAIN"))
    for _ in range(3):
        with pytest.raises(OSError, match="EAGAIN"):
            zygotes.fork()
    spawned.fails.clear()
    assert zygotes.fork() is spawned.made[0]
    assert list(zygotes.all()) == [spawned.made[0], silent]


def test_reserves_that_fail_again_and_again_are_spawned_more_and_more_seldom(spawned, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    zygotes = Zygotes(Zygote(), None)
    for _ in range(600):
        zygotes.renew()
        if spawned.made:
            spawned.made[-1].error = ZygoteError("it cannot import SGLang")
        now[0] += 1.0
    assert 5 <= len(spawned.made) <= 10


def test_none_is_spawned_once_all_were_ended(spawned):
    """By a thread that looks after them meanwhile: it would import SGLang for nobody."""
    zygotes = Zygotes(Zygote(ZygoteError("silent")), None)
    zygotes.kill()
    with pytest.raises(ZygoteError, match="being shut down"):
        zygotes.fork()
    assert spawned.made == []
