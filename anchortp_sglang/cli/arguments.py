"""Options that commands for a running server have in common."""

from typing import Annotated

import typer

UrlOption = Annotated[str, typer.Option("--url", help="Address of the server.")]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="ANCHORTP_API_KEY", help="The server's API key, if it has one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DEFAULT_URL = "http://127.0.0.1:30000"
FLEET_URL = "http://127.0.0.1:8000"
"""Where Ray Serve's proxy listens by default."""
