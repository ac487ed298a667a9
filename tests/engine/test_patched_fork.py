"""A fork of SGLang without its plugin system, patched as docs/forks.md says, serves and recovers."""

import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from anchortp_sglang.hooks.manifest import patches_folder
from anchortp_sglang.hooks.source import package_folder
from anchortp_sglang.testing.server import Server

FLAGS = ("--max-total-tokens", "4096", "--dtype", "float32")  # as stock's answers
PROMPT = [(7 * position) % 480 for position in range(33)]
REQUEST = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}}

WITHOUT_PLUGINS = """
PLATFORM_PLUGINS_GROUP = "sglang.srt.platforms"
GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"


def load_plugins_by_group(*args, **kwargs):
    return {}


def load_plugins():
    pass
"""


@pytest.fixture
def fork(tmp_path):
    """A folder with the package ``sglang``: the installed one, without its registry of hooks, and patched."""
    installed, tree = package_folder("sglang"), tmp_path / "python" / "sglang"
    tree.mkdir(parents=True)
    shutil.copytree(installed / "srt", tree / "srt")
    for entry in installed.iterdir():
        if entry.name not in ("srt", "__pycache__"):
            (tree / entry.name).symlink_to(entry)
    plugins = tree / "srt" / "plugins"
    (plugins / "hook_registry.py").unlink()
    (plugins / "__init__.py").write_text(WITHOUT_PLUGINS)
    patch = patches_folder() / "sglang-0.5.23.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    return tree.parent


def test_a_patched_fork_without_plugins_serves_and_recovers(fork, forge, checkpoint, places, tmp_path):
    (expected,) = forge.value(
        "engine_jobs:stock_generate",
        model=str(checkpoint["qwen3"]),
        prompts=[PROMPT],
        max_new_tokens=300,
        latents=False,
    )
    path = os.pathsep.join(filter(None, [str(fork), os.environ.get("PYTHONPATH")]))
    env = {**places, "PYTHONPATH": path}
    with Server(checkpoint["qwen3"], 2, *FLAGS, log=tmp_path / "log", env=env) as server:
        assert re.search(r"\d+ hooks into SGLang 0\.5\.23 installed and verified", server.log.read_text())
        answers = []
        client = threading.Thread(target=lambda: answers.append(server.post("/generate", REQUEST)))
        client.start()
        status = server.status()
        assert str(fork) in Path(f"/proc/{server.pid}/environ").read_text()
        os.kill(status["devices"][1]["rank_pid"], signal.SIGKILL)
        server.wait_serving(generation=status["generation"] + 1)
        client.join(60)
        assert answers[0]["output_ids"] == expected["ids"]
