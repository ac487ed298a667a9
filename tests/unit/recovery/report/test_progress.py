"""When a recovery is over, on a real event loop."""

import asyncio

import pytest

from anchortp_sglang.recovery.report.progress import RecoveryProgress
from anchortp_sglang.recovery.report.record import Recoveries


class Server:
    """What the progress asks of the coordinator; ``clients`` wait for tokens."""

    def __init__(self):
        self.serving, self.clients, self.tasks = True, 1, set()
        self.recoveries = Recoveries()
        self.progress = RecoveryProgress(self.recoveries, lambda: self.serving, lambda: self.clients > 0, self.spawn)

    def spawn(self, work):
        self.tasks.add(asyncio.get_running_loop().create_task(work))

    def recover(self):
        self.progress.begin()
        self.progress.resumed()
        return self.progress.recovery


def run(scenario):
    async def whole():
        server = Server()
        await scenario(server)
        for task in server.tasks:
            task.cancel()

    asyncio.run(whole())


def test_it_is_over_with_the_first_token_that_is_handed_out():
    async def scenario(server):
        recovery = server.recover()
        await asyncio.sleep(0.12)
        assert server.progress.recovery is recovery and not recovery.finished
        server.progress.on_tokens(1)
        assert recovery.finished and recovery.stages[-1] == ("first_token", recovery.tfs_s)
        assert recovery.tfs_s == pytest.approx(0.12, abs=0.1)

    run(scenario)


def test_tokens_of_the_old_generation_do_not_end_it():
    async def scenario(server):
        server.progress.begin()
        server.serving = False
        server.progress.on_tokens(3)
        assert not server.progress.recovery.finished and server.progress.recovery.tfs_s is None

    run(scenario)


@pytest.mark.parametrize("leave_s", [0.0, 0.1])
def test_when_those_who_waited_have_left_it_is_over_and_the_next_clients_token_is_not_its(leave_s):
    async def scenario(server):
        server.clients = 0 if leave_s == 0.0 else 1
        recovery = server.recover()
        await asyncio.sleep(leave_s)
        server.clients = 0
        await asyncio.sleep(0.15)
        assert recovery.finished and server.progress.recovery is None
        server.clients = 1
        server.progress.on_tokens(1)
        assert recovery.tfs_s is None and "first_token" not in dict(recovery.stages)

    run(scenario)


def test_another_fault_before_a_token_ends_it_and_begins_the_next():
    async def scenario(server):
        first = server.recover()
        second = server.recover()
        assert first.finished and not second.finished
        server.progress.on_tokens(1)
        await asyncio.sleep(0.12)
        assert first.tfs_s is None and second.tfs_s is not None
        assert len(server.recoveries.to_json()) == 2

    run(scenario)
