"""The fleet's gateway in this process, before servers that it reaches through connections which tests can cut."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import aiohttp
import uvicorn

from anchortp_sglang.fleet.gateway import Gateway
from anchortp_sglang.fleet.members import Known, Members


class Wire:
    """A TCP port that is connected with a server's. ``cut`` resets what is connected, as the loss of a host does."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._connections: set[asyncio.Transport] = set()
        self.url = ""

    async def open(self) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0, limit=2**20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._target.hostname, self._target.port, limit=2**20)
        ends = {writer.transport, there[1].transport}
        self._connections |= ends
        try:
            await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
        finally:
            self._connections -= ends
            for end in ends:
                end.abort()

    def cut(self) -> int:
        """Reset all connections; return how many there were."""
        ends = list(self._connections)
        for end in ends:
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            end.abort()
        return len(ends) // 2


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


class Front:
    """``url``: where clients connect. ``cut`` takes away all servers at once, for a moment."""

    def __init__(self) -> None:
        self.url = ""
        self.wires: list[Wire] = []
        self.loop = asyncio.new_event_loop()
        self.gateway: Gateway

    def cut(self) -> int:
        """Cut all wires; return how many connections were lost."""

        async def all_of_them() -> int:
            return sum(wire.cut() for wire in self.wires)

        return asyncio.run_coroutine_threadsafe(all_of_them(), self.loop).result(10)


@contextlib.contextmanager
def front(urls: Sequence[str]) -> Iterator[Front]:
    """Run a gateway before servers, each of which it knows twice, under two names."""
    made, ready = Front(), threading.Event()

    async def serve() -> None:
        made.wires = [Wire(url) for url in urls for _ in range(2)]
        for wire in made.wires:
            await wire.open()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            members = Members(session)
            members.update([Known(f"server-{number}", wire.url) for number, wire in enumerate(made.wires)])
            made.gateway = Gateway(members, session)
            listening = socket.create_server(("127.0.0.1", 0))
            made.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            config = uvicorn.Config(made.gateway, lifespan="off", log_level="warning")
            made.server = uvicorn.Server(config)
            made.server.install_signal_handlers = lambda: None
            watching = asyncio.ensure_future(members.watch())
            ready.set()
            await made.server.serve([listening])
            watching.cancel()
            for wire in made.wires:
                wire.cut()
        await asyncio.sleep(0.1)  # for what has been cut to end

    thread = threading.Thread(target=made.loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield made
    finally:
        made.server.should_exit = True
        thread.join(30)
