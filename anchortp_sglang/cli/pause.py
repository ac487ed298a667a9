"""The commands ``anchortp pause`` and ``continue``: no request is computed in between, and none is lost."""

from __future__ import annotations

import typer

from anchortp_sglang.cli import client
from anchortp_sglang.cli.arguments import DEFAULT_URL, KeyOption, UrlOption


def pause(url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Let a running server compute no further, until it is told to continue. Open and new requests wait."""
    _ask(client.PAUSE, url, api_key, "paused: requests wait for 'anchortp continue'")


def continue_(url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Let a paused server go on."""
    _ask(client.CONTINUE, url, api_key, "requests are computed")


def _ask(route: client.Route, url: str, api_key: str | None, done: str) -> None:
    try:
        client.tell(url, route, api_key)
    except client.RefusedError as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(1) from None
    except client.UnreachableError as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(done)
