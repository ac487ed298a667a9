"""Code in an interpreter of its own: pytest has threads and must not fork."""

import os
import subprocess
import sys
import textwrap


def run(prelude: str, body: str) -> str:
    """What it prints. It can import the helpers beside this file."""
    path = os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
