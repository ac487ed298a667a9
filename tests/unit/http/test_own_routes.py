"""The routes under /anchortp: methods, and what injection makes of bodies that make no sense."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware

from anchortp_sglang.http.own_routes import OwnRoutes, guard

JSON = ((b"content-type", b"application/json"),)
NOT_SERVING = SimpleNamespace(generation=None)
GOOD = b'{"device": 0, "kind": "process"}'


def ask(method, path, body=b"", headers=JSON, allow_injection=True, pieces=1):
    routes = OwnRoutes(NOT_SERVING, allow_injection)
    size = -(-len(body) // pieces) or 1
    sent = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in sent]
    messages[-1]["more_body"] = False

    async def receive():
        return messages.pop(0)

    scope = {"method": method, "path": path, "query_string": b"", "headers": headers}
    return asyncio.run(routes.answer(path, scope, receive))


def said(answer):
    return answer.code, json.loads(answer.body)["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/anchortp/status", "GET, HEAD"),
        ("DELETE", "/anchortp/timeline", "GET, HEAD"),
        ("GET", "/anchortp/inject", "POST"),
        ("PUT", "/anchortp/inject/", "POST"),
        ("OPTIONS", "/anchortp/inject", "POST"),  # else SGLang's CORS middleware would invite any page
    ],
)
def test_other_methods_are_told_which_are_allowed(method, path, allowed):
    answer = ask(method, path)
    assert (answer.code, answer.headers["allow"]) == (405, allowed)


def test_what_is_not_ours_is_left_to_sglang():
    for path in ("/anchortp", "/anchortp/", "/anchortp/no", "/generate", "/anchortp/status/more", "//anchortp/status"):
        assert ask("GET", path) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[0]",
        b"{}",
        b'{"device": 0}',
        b'{"device": "0", "kind": "process"}',
        b'{"device": true, "kind": "process"}',
        b'{"device": 0.0, "kind": "process"}',
        b'{"device": NaN, "kind": "process"}',
        b'{"device": null, "kind": "process"}',
        b'{"device": [0], "kind": "process"}',
        b'{"device": 0, "kind": 1}',
        b'{"device": 0, "kind": "\xff"}',
        b'{"device": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"other": ' + b"[" * 2000 + b"]" * 2000 + b', "device": 0, "kind": "process"}',
        b"\x00" * 100,
    ],
)
def test_a_body_that_makes_no_sense_is_a_400(body):
    code, detail = said(ask("POST", "/anchortp/inject", body))
    assert code == 400
    assert '{"device": 0, "kind": "process"}' in detail


@pytest.mark.parametrize("device", [-1, 7, 10**30])
def test_a_device_that_is_none_is_refused_when_the_body_is_understood(device):
    """Here because nothing is serving; on a server because there is no such device."""
    code, _ = said(ask("POST", "/anchortp/inject", json.dumps({"device": device, "kind": "process"}).encode()))
    assert code == 409


def test_a_body_in_pieces_is_put_together_and_one_too_long_is_a_413():
    assert ask("POST", "/anchortp/inject", GOOD, pieces=7).code == 409
    assert ask("POST", "/anchortp/inject", GOOD + b" " * 5000, pieces=3).code == 413


@pytest.mark.parametrize("given", [None, b"text/plain", b"multipart/form-data; boundary=x", b"text/json", b""])
def test_what_a_foreign_page_may_send_unasked_is_a_415(given):
    headers = () if given is None else ((b"content-type", given),)
    assert ask("POST", "/anchortp/inject", GOOD, headers).code == 415


def test_a_type_with_parameters_in_any_case_is_json():
    assert ask("POST", "/anchortp/inject", GOOD, ((b"content-type", b"Application/JSON; charset=utf-8"),)).code == 409


def test_without_the_flag_nothing_is_read():
    code, detail = said(ask("POST", "/anchortp/inject", b"no JSON", (), allow_injection=False))
    assert code == 403 and "--anchor-allow-injection" in detail


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_what_is_not_ours_is_not_found_by_any_method(method):
    app = FastAPI()
    guard(app)
    assert TestClient(app).request(method, "/anchortp/other").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "key", "allowed"),
    [
        ("POST", "/anchortp/reconfigure", "", False),
        ("POST", "/anchortp/reconfigure/", "user", False),
        ("POST", "/anchortp/inject", "user", False),
        ("POST", "/anchortp/reconfigure", "admin", True),
        ("POST", "/anchortp/journaled", "", False),
        ("POST", "/anchortp/journaled", "user", True),
        ("GET", "/anchortp/status", "user", True),
        ("GET", "/anchortp/status", "", False),
    ],
)
def test_sglang_lets_only_the_admin_key_post(method, path, key, allowed):
    app, answered = FastAPI(), []
    guard(app)

    class Ours:
        def __init__(self, app):
            pass

        async def __call__(self, scope, receive, send):
            answered.append(scope["path"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    app.add_middleware(Ours)
    add_api_key_middleware(app, api_key="user", admin_api_key="admin")
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "server": ("localhost", 1),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        "headers": [(b"authorization", f"Bearer {key}".encode())] if key else [],
    }
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"] == 200, bool(answered)) == (allowed, allowed)
