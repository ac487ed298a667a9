"""The ingress's own routes, and what it hands on, with real HTTP servers behind it that answer what a test says."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from anchortp_sglang.fleet.gateway import Gateway
from anchortp_sglang.fleet.members import Known, Members

MOST_BYTES = 1000
NOBODY = "http://127.0.0.1:1"


class Backend:
    """An HTTP server that answers ``status`` to everything, with the body that it got."""

    def __init__(self, status: int = 200, delay_s: float = 0.0) -> None:
        self.status, self.delay_s = status, delay_s
        self.asked: list[tuple[str, bytes]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.asked.append((request.path_qs, body))
        await asyncio.sleep(self.delay_s)
        return web.Response(status=self.status, body=body)


Use = Callable[[httpx.AsyncClient], Awaitable[None]]


def behind(*servers: Backend | str, use: Use) -> None:
    """Run ``use`` with a client of an ingress in front of these servers, or urls."""

    async def run() -> None:
        runners = []
        async with aiohttp.ClientSession() as session:
            known = []
            for number, server in enumerate(servers):
                url = server
                if isinstance(server, Backend):
                    app = web.Application()
                    app.router.add_route("*", "/{path:.*}", server.answer)
                    runners.append(web.AppRunner(app))
                    await runners[-1].setup()
                    site = web.TCPSite(runners[-1], "127.0.0.1", 0)
                    await site.start()
                    url = server.url = f"http://127.0.0.1:{runners[-1].addresses[0][1]}"
                known.append(Known(f"s{number}", str(url)))
            members = Members(session)
            members.update(known)
            transport = httpx.ASGITransport(Gateway(members, session, max_body_bytes=MOST_BYTES))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as client:
                await use(client)
        for runner in runners:
            await runner.cleanup()

    asyncio.run(run())


def test_a_flush_goes_to_every_server():
    one, two = Backend(), Backend()

    async def use(client):
        answer = await client.post("/flush_cache?timeout=3")
        assert (answer.status_code, answer.json()) == (200, {"success": True, "servers": 2})

    behind(one, two, use=use)
    assert [server.asked for server in (one, two)] == [[("/flush_cache?timeout=3", b"")]] * 2


@pytest.mark.parametrize(("other", "code"), [(Backend(400), 400), (NOBODY, 503)])
def test_a_flush_that_one_server_does_not_do_is_told_as_failed(other, code):
    one = Backend()

    async def use(client):
        answer = await client.post("/flush_cache")
        assert (answer.status_code, answer.json()) == (code, {"success": False, "servers": 2})

    behind(one, other, use=use)
    assert one.asked, "the other one was asked all the same"


def test_a_server_that_does_not_answer_a_flush_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("anchortp_sglang.fleet.gateway._STATUS_TIMEOUT_S", 0.2)

    async def use(client):
        answer = await client.post("/flush_cache")
        assert (answer.status_code, answer.json()["success"]) == (503, False)

    behind(Backend(delay_s=1), Backend(), use=use)


def test_an_abort_by_rid_is_sent_for_every_name_that_the_request_may_have():
    one = Backend()

    async def use(client):
        assert (await client.post("/abort_request", json={"rid": "mine"})).status_code == 200

    behind(one, use=use)
    assert {"mine"} < {json.loads(body)["rid"] for _, body in one.asked}


def test_without_servers_it_says_so():
    async def use(client):
        for method, path, said in (
            ("POST", "/flush_cache", {"success": False, "servers": 0}),
            ("GET", "/health", {"status": "down", "servers": 0}),
        ):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.json()) == (503, said)
        assert (await client.get("/anchortp/status")).json()["servers"] == []

    behind(use=use)


def test_routes_of_one_server_are_not_answered_by_any():
    one = Backend()

    async def use(client):
        answer = await client.post("/anchortp/reconfigure", json={})
        assert answer.status_code == 404
        assert "a route of one server" in answer.json()["error"]["message"]

    behind(one, use=use)
    assert one.asked == []


def test_a_body_that_is_too_long_is_refused_before_any_server_has_it():
    one = Backend()

    async def use(client):
        answer = await client.post("/v1/models", content=b"x" * (MOST_BYTES + 1))
        assert answer.status_code == 413

    behind(one, use=use)
    assert one.asked == []


@pytest.mark.parametrize("session", [f"s{number}" for number in range(6)])
def test_another_request_goes_to_a_server_that_is_there_with_its_own_answer(session):
    """Whichever server is chosen first, one refuses connections: it never had the request."""
    one = Backend(418)

    async def use(client):
        answer = await client.get("/get_model_info?a=b", headers={"x-session-id": session})
        assert answer.status_code == 418

    behind(NOBODY, one, use=use)
    assert one.asked == [("/get_model_info?a=b", b"")]


def test_what_a_server_says_of_itself_is_in_the_status_or_why_it_says_nothing():
    async def use(client):
        found: list[dict[str, Any]] = (await client.get("/anchortp/status")).json()["servers"]
        assert [sorted({"status", "error"} & one.keys()) for one in found] == [["error"], ["error"]]
        assert "ClientConnectorError" in found[1]["error"]

    behind(Backend(), NOBODY, use=use)
