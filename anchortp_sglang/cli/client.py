"""HTTP client of a running server: reads its status, changes its devices, pauses it, injects faults."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

STATUS_TIMEOUT_S = 10.0
CHANGE_TIMEOUT_S = 24 * 3600.0  # the answer comes once the new devices serve
INJECT_TIMEOUT_S = 60.0  # the answer comes once the fault has taken effect

Route = tuple[str, dict[str, Any]]
PAUSE: Route = ("/pause_generation", {"mode": "in_place"})
CONTINUE: Route = ("/continue_generation", {})
"""Routes of SGLang's own that take a body and answer that it is done."""


class UnreachableError(RuntimeError):
    """No anchortp server answers at the address."""


class RefusedError(RuntimeError):
    """The server refused the request. The text is the server's."""


def get_status(url: str, api_key: str | None = None, timeout_s: float = STATUS_TIMEOUT_S) -> dict[str, Any]:
    """Return the answer to ``GET /anchortp/status``."""
    return _exchange(url, "/anchortp/status", None, api_key, timeout_s)


def inject(
    url: str, device: int, kind: str, api_key: str | None = None, timeout_s: float = INJECT_TIMEOUT_S
) -> dict[str, Any]:
    """Inject a fault of ``kind`` at ``device`` by ``POST /anchortp/inject``; return ok, verified, detail."""
    return _exchange(url, "/anchortp/inject", {"device": device, "kind": kind}, api_key, timeout_s)


def reconfigure(
    url: str, change: dict[str, Any], api_key: str | None = None, timeout_s: float = CHANGE_TIMEOUT_S
) -> dict[str, Any]:
    """Change the server's devices by ``POST /anchortp/reconfigure``; return what the server answers."""
    return _exchange(url, "/anchortp/reconfigure", change, api_key, timeout_s)


def tell(url: str, route: Route, api_key: str | None = None, timeout_s: float = STATUS_TIMEOUT_S) -> None:
    """Ask one of SGLang's routes for something that it does at once."""
    _exchange(url, *route, api_key, timeout_s)


def _exchange(url: str, path: str, body: Any, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    try:
        answer = json.loads(_read(_request(url.rstrip("/") + path, body, api_key), timeout_s))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise UnreachableError(
                f"{url} is not an anchortp server: start it with 'python -m anchortp_sglang.launch_server'"
            ) from None
        raise RefusedError(_reason(error)) from None
    except TimeoutError:
        raise UnreachableError(
            f"{url} has not answered within {timeout_s:g} s; it may still do what it was asked"
        ) from None
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(f"no server at {url} ({reason}): is it running, and is --url right?") from None
    except ValueError as error:  # not a URL, not JSON
        raise UnreachableError(f"no readable answer from {url} ({error}): is --url right?") from None
    if not isinstance(answer, dict):
        raise UnreachableError(f"no readable answer from {url} ({str(answer)[:200]}): is --url right?")
    return answer


def _request(url: str, body: Any, api_key: str | None) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(url, data=data, headers=headers)


def _read(request: urllib.request.Request, timeout_s: float) -> bytes:
    # Without proxies: http_proxy is often set where servers run, and no_proxy often is not.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as response:
        return response.read()


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the server's message, from the forms that FastAPI, SGLang and our routes use."""
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        error_of = answer.get("error")
        inner = error_of.get("message") if isinstance(error_of, dict) else error_of
        text = str(answer.get("detail") or answer.get("message") or inner or text)
    return f"{text.strip()[:500] or error.reason} (HTTP {error.code})"
