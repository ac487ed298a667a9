"""Bodies above the limit: a 413, whatever the client says of their length, over real sockets."""

import http.client
import json
import threading

import fastapi
import pytest
import uvicorn

from anchortp_sglang.http.body_limit import limited
from anchortp_sglang.testing.server import free_port

LIMIT = 1 << 20
READ = []


def app():
    made = fastapi.FastAPI()

    @made.post("/parsed")
    async def parsed(body: dict):
        return len(body["text"])

    @made.post("/raw")
    async def raw(request: fastapi.Request):
        return len(await request.body())

    async def middleware(scope, receive, send):
        async def counting():
            message = await receive()
            READ.append(len(message.get("body", b"")))
            return message

        await made(scope, limited(scope, counting, LIMIT, "send less"), send)

    return middleware


@pytest.fixture(scope="module", params=["h11", "httptools"])
def parser(request):
    """What uvicorn reads HTTP with: the second one if it is installed, as it is with ray[serve]."""
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module")
def port(parser):
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app(), port=port, http=parser, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        pass
    yield port
    server.should_exit = True
    thread.join()


def post(port, path, body, headers, chunked=False):
    READ.clear()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Content-Type": "application/json"} | headers
    connection.request("POST", path, body, headers, encode_chunked=chunked)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text) if answer.getheader("Content-Type") == "application/json" else text


def document(size):
    empty = len(json.dumps({"text": ""}))
    return json.dumps({"text": "x" * (size - empty)}).encode()


def chunks(body):
    return (body[at : at + 8192] for at in range(0, len(body), 8192))


@pytest.mark.parametrize("path", ["/parsed", "/raw"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_byte_too_much_is_refused_and_the_limit_itself_is_not(port, path, chunked):
    for size, wanted in ((LIMIT, 200), (LIMIT + 1, 413)):
        body, headers = document(size), {}
        if chunked:
            body, headers = chunks(body), {"Transfer-Encoding": "chunked"}
        code, answer = post(port, path, body, headers, chunked)
        assert code == wanted
        if wanted == 413:
            assert answer["detail"] == f"The request's body is longer than {LIMIT} bytes; send less"


def test_a_long_body_that_says_so_is_refused_before_it_is_read(port):
    code, _ = post(port, "/raw", document(20 * LIMIT), {})
    assert code == 413
    assert READ == []


def test_a_long_body_that_does_not_say_so_is_read_only_up_to_the_limit(port):
    code, _ = post(port, "/raw", chunks(document(20 * LIMIT)), {"Transfer-Encoding": "chunked"}, True)
    assert code == 413
    assert LIMIT < sum(READ) < 2 * LIMIT


def test_a_length_that_is_announced_and_never_sent_is_refused_at_once(port):
    code, _ = post(port, "/raw", b"{}", {"Content-Length": str(10**15)})
    assert code == 413


def test_more_bytes_than_announced_are_no_part_of_the_request(port, parser):
    try:
        code, answer = post(port, "/raw", b"x" * (2 * LIMIT), {"Content-Length": "10"})
    except (ConnectionResetError, BrokenPipeError):  # closed with bytes unread: the answer may be lost
        code, answer = None, None
    if parser == "h11":
        assert (code, answer) == (200, 10)
    else:
        assert code in (400, None) and sum(READ) <= 10
