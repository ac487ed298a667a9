"""How commands for a running server end if it does not do what they ask for."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from anchortp_sglang.cli import client


@contextmanager
def told() -> Iterator[None]:
    """Say why the server refuses, and exit with 1; or that none answers, and exit with 2."""
    try:
        yield
    except client.RefusedError as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(1) from None
    except client.UnreachableError as error:
        typer.echo(f"anchortp: {error}", err=True)
        raise typer.Exit(2) from None
