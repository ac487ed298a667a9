"""POST /anchortp/journaled: an answer in pieces, without those that the client has, and who may ask for it."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from anchortp_sglang.http import journaled
from anchortp_sglang.http.middleware import AnchorMiddleware
from anchortp_sglang.recovery.requests import journal
from anchortp_sglang.recovery.requests.journal import Row, Taken

PIECES = [b'data: {"index":0,"n":1}\n\n', b'data: {"index":1}\n\n', b'data: {"index":0,"n":2}\n\n', b"data: [DONE]\n\n"]
JSON = ((b"content-type", b"application/json"),)


async def handler(scope, receive, send):
    """Stands where SGLang does: says what it was asked, and streams four pieces, each with an entry of the journal."""
    asked = await receive()
    headers = [(b"x-path", scope["path"].encode()), (b"x-body", asked["body"])]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number, piece in enumerate(PIECES):
        journal.current.get().fresh += [Row(of=0, token_ids=[number]), Taken(of=0, tokens=number + 1)]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def ask(body, headers=JSON, method="POST", allowed=True):
    """Return the status and the lines of the answer."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message):
        sent.append(message)

    coordinator = SimpleNamespace(inflight=SimpleNamespace(refusal=None))
    ours = AnchorMiddleware(handler, coordinator, lambda: None, lambda: None, False, 2**20, allow_journals=allowed)
    scope = {"type": "http", "method": method, "path": journaled.PATH, "headers": [*headers]}
    asyncio.run(ours(scope, receive, send))
    lines = b"".join(message.get("body", b"") for message in sent).splitlines()
    return sent[0]["status"], [json.loads(line) for line in lines]


GENERATE = {"path": "/generate", "body": {"text": "a", "stream": True}}


def test_an_answer_comes_in_pieces_with_the_entries_that_led_to_each():
    status, lines = ask(GENERATE)
    assert status == 200
    assert lines[0]["status"] == 200
    assert ["x-path", "/generate"] in lines[0]["headers"]
    assert json.loads(dict(lines[0]["headers"])["x-body"]) == GENERATE["body"]
    assert [line.get("body", "").encode() for line in lines[:-1]] == PIECES
    assert [line.get("index", "") for line in lines[:-1]] == ["0", "1", "0", ""]
    assert [entry["kind"] for line in lines for entry in line.get("journal", ())] == ["row", "taken"] * 4
    assert lines[-1] == {"end": True}


def test_pieces_that_the_client_has_are_left_out_of_each_choice():
    _, lines = ask(GENERATE | {"shown": {"0": 1, "1": 1}})
    assert [line["body"].encode() for line in lines if line.get("body")] == PIECES[2:]
    assert lines[0]["status"] == 200 and lines[-1]["end"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"allowed": False}, 403),
        ({"method": "GET"}, 405),
        ({"headers": ((b"content-type", b"text/plain"),)}, 415),
        ({"headers": (*JSON, (b"content-length", b"9999999"))}, 413),
        ({"body": {"path": "/flush_cache", "body": {}}}, 400),
        ({"body": []}, 400),
    ],
)
def test_what_is_not_served_says_why(change, status):
    code, lines = ask(**{"body": GENERATE} | change)
    assert code == status
    assert len(json.dumps(lines[0])) > 30
