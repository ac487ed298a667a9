"""The commands ``anchortp pause`` and ``continue``: no request is computed in between, and none is lost."""

from __future__ import annotations

import typer

from anchortp_sglang.cli import client
from anchortp_sglang.cli.arguments import DEFAULT_URL, KeyOption, UrlOption
from anchortp_sglang.cli.exits import told


def pause(url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Let a running server compute no further, until it is told to continue. Open and new requests wait."""
    with told():
        client.tell(url, client.PAUSE, api_key)
    typer.echo("paused: requests wait for 'anchortp continue'")


def continue_(url: UrlOption = DEFAULT_URL, api_key: KeyOption = None) -> None:
    """Let a paused server go on."""
    with told():
        client.tell(url, client.CONTINUE, api_key)
    typer.echo("requests are computed")
