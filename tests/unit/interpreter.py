"""Code in a process of its own, whose main thread is its only one: pytest has more and must not fork."""

import os
import tempfile
import textwrap

import forge


def run(prelude: str, body: str) -> str:
    """What it prints. It can import the helpers beside this file; SGLang has been imported already."""
    with tempfile.NamedTemporaryFile("r") as printed:
        source = textwrap.dedent(prelude) + textwrap.dedent(body)
        done = forge.shared().run("interpreter:execute", timeout_s=120, source=source, printed=printed.name)
        assert done.code == 0, done.output
        return printed.read()


def execute(source: str, printed: str) -> None:
    """In the forked process: run ``source`` as its main module."""
    import __main__

    os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), 1)
    exec(compile(source, "a test", "exec"), __main__.__dict__)
