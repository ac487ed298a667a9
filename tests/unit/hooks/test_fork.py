"""``anchortp doctor --sglang``: a fork's tree is judged, symbol by symbol, without being imported."""

import json
import re
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from anchortp_sglang.cli.app import app
from anchortp_sglang.hooks.manifest import patches_folder
from anchortp_sglang.hooks.source import package_folder, source_file


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A copy of SGLang's package, of those files that hooks and imports refer to."""
    tree = tmp_path_factory.mktemp("fork") / "python" / "sglang"
    ignore = shutil.ignore_patterns("__pycache__", "multimodal_gen", "kernels", "*.json", "*.so")
    shutil.copytree(package_folder("sglang"), tree, ignore=ignore)
    return tree


@pytest.fixture
def changed(release):
    """Replace text in a file of the copy, for one test: ``changed(symbol or path, old, new)``."""
    undo = {}

    def change(place, old, new):
        file = release / place if place.endswith(".py") else source_file(place, release)
        text = file.read_text()
        assert old in text
        undo.setdefault(file, text)
        file.write_text(text.replace(old, new, 1))

    yield change
    for file, text in undo.items():
        file.write_text(text)


def judge(tree):
    done = CliRunner().invoke(app, ["doctor", "--json", "--sglang", str(tree)])
    return done.exit_code, {check["name"]: check for check in json.loads(done.stdout)}


def test_the_release_itself_passes_wherever_the_path_points(release):
    for path in (release, release.parent, release.parent.parent):
        code, checks = judge(path)
        assert code == 0
        assert {name: check["level"] for name, check in checks.items()} == dict.fromkeys(
            ("version", "hooks", "imports"), "PASS"
        )


def test_every_change_is_named_with_what_it_means(release, changed):
    scheduler = "sglang.srt.managers.scheduler.Scheduler."
    changed(scheduler + "flush_cache", "def flush_cache(self", "def flush_cache(self, force_it")
    changed(scheduler + "_add_request_to_queue", "def _add_request_to_queue(", "def _queue_request(")
    free = "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.free"
    changed(free, "if free_index.numel() == 0:", "if not free_index.numel():")
    changed("_version.py", "'0.5.23'", "'0.5.23+ours'")
    changed("srt/managers/io_struct.py", "class TokenizedGenerateReqInput(", "class TokenizedInput(")
    code, checks = judge(release)
    assert code == 1
    assert checks[scheduler + "flush_cache"]["level"] == "FAIL"
    assert "its parameters were (self" in checks[scheduler + "flush_cache"]["detail"]
    assert "missing: _add_request_to_queue" in checks[scheduler + "_add_request_to_queue"]["detail"]
    assert checks[free]["level"] == "WARN"
    assert f"--anchor-allow-drift {free}" in checks[free]["way_out"]
    assert (checks["version"]["level"], "0.5.23+ours" in checks["version"]["detail"]) == ("WARN", True)
    assert checks["sglang.srt.managers.io_struct.TokenizedGenerateReqInput"]["level"] == "FAIL"
    assert len(checks) == 5


def test_names_that_no_hook_names_are_missed_too(release, changed):
    """The coordinator uses them; the hooked functions are as they were."""
    file = source_file("sglang.srt.managers.tokenizer_manager.TokenizerManager", release)
    text = file.read_text()
    changed(str(file.relative_to(release)), text, re.sub(r"\babort_sent\b", "abort_was_sent", text))
    code, checks = judge(release)
    assert code == 1
    found = checks["sglang/srt/managers/tokenizer_manager.py"]
    assert found["detail"] == "does not define abort_sent, which anchortp-sglang uses"


def test_a_tree_without_plugins_needs_seams(release, changed):
    registry = release / "srt" / "plugins" / "hook_registry.py"
    moved = registry.rename(registry.with_suffix(".away"))
    try:
        code, checks = judge(release)
        assert code == 1
        assert "there is no plugin system, and no seam at 64 symbols" in checks["plugins"]["detail"]
        patch = patches_folder() / "sglang-0.5.23.patch"
        subprocess.run(["git", "apply", "-p3", str(patch)], cwd=release, check=True)
        code, checks = judge(release)
        assert "plugins" not in checks
        subprocess.run(["git", "apply", "-R", "-p3", str(patch)], cwd=release, check=True)
    finally:
        moved.rename(registry)


def test_a_tree_that_python_cannot_read_or_that_is_none_is_refused(release, changed, tmp_path):
    changed("srt/managers/scheduler.py", "import faulthandler", "import import")
    code, checks = judge(release)
    assert code == 1
    assert "scheduler.py" in checks["source"]["detail"]
    done = CliRunner().invoke(app, ["doctor", "--sglang", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no source tree of SGLang" in done.output
