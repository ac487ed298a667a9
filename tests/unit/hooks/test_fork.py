"""``anchortp doctor --sglang``: a fork's tree is judged, symbol by symbol, without being imported."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from anchortp_sglang.cli.app import app
from anchortp_sglang.hooks.manifest import read_manifest
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


def test_a_name_that_a_hook_relies_on_is_missed(release, changed):
    """The hooked functions themselves are as they were."""
    file = source_file("sglang.srt.managers.detokenizer_manager.DetokenizerManager", release)
    changed(str(file.relative_to(release)), file.read_text(), file.read_text().replace("decode_status", "status_of"))
    code, checks = judge(release)
    assert code == 1
    told = [check["detail"] for check in checks.values() if "uses decode_status, which" in check["detail"]]
    users = [entry.symbol for entry in read_manifest().entries if "decode_status" in entry.relies_on]
    assert len(told) == len(users) >= 1


def test_a_tree_that_python_cannot_read_or_that_is_none_is_refused(release, changed, tmp_path):
    changed("srt/managers/scheduler.py", "import faulthandler", "import import")
    code, checks = judge(release)
    assert code == 1
    assert "scheduler.py:" in checks["source"]["detail"]
    done = CliRunner().invoke(app, ["doctor", "--sglang", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no source tree of SGLang" in done.output
