"""Hooks take on the real SGLang or stop the start; without the launcher or Engine there are none."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from anchortp_sglang.hooks import manifest
from anchortp_sglang.testing.server import free_port


@pytest.fixture(scope="module")
def port():
    return free_port()


@pytest.fixture
def argv(checkpoint, port):
    return f"--model-path {checkpoint['qwen3']} --tp-size 2 --max-total-tokens 1024 --port {port}".split()


@pytest.fixture
def public_run_dir(run_base, port):
    """--anchor-run-dir that is refused after the hooks have been installed: as far as these tests go."""
    folder = run_base / "tmp" / "base"
    run_dir = folder / f"run-{port}"
    run_dir.mkdir(parents=True)
    run_dir.chmod(0o755)
    yield ["--anchor-run-dir", str(folder)]
    run_dir.rmdir()
    folder.rmdir()


def test_a_process_that_only_imports_has_no_hooks_and_then_every_one_takes(forge):
    before, after, targets = forge.value("engine_jobs:hooks_of_a_preloaded_process")
    assert [plugin for plugin in before if plugin.startswith("anchortp")] == []
    assert set(targets) <= set(after)


def test_no_entry_point_loads_anything_into_stock_sglang():
    plugins = entry_points(group="sglang.srt.plugins")
    assert [point.value for point in plugins if point.value.startswith("anchortp_sglang")] == []


def test_the_manifest_is_the_table(forge, tmp_path):
    """Renew it with ``python -m anchortp_sglang.hooks --write``."""
    kept, written = forge.value("engine_jobs:manifest_text", path=str(tmp_path / "manifest.toml"))
    assert kept == written


def test_a_hook_whose_target_is_gone_stops_the_start_with_its_name(forge, argv, places):
    target = "sglang.srt.managers.scheduler.Scheduler.no_such_method"
    done = forge.run("engine_jobs:launch_with_a_hook", env=places, argv=argv, target=target)
    assert done.code == 2
    assert target in refusal(done)


def test_a_hook_whose_target_is_gone_stops_the_start_even_if_drift_is_allowed(forge, argv, places):
    target = "sglang.srt.managers.scheduler.Scheduler.no_such_method"
    argv = [*argv, "--anchor-allow-drift"]
    done = forge.run("engine_jobs:launch_with_a_hook", env=places, argv=argv, target=target)
    assert done.code == 2
    assert "could not be installed" in refusal(done)
    assert target in refusal(done)


def test_a_hook_that_another_plugin_covers_stops_the_start_with_its_name(forge, argv, places):
    target = "sglang.srt.managers.tokenizer_manager.TokenizerManager._dispatch_to_scheduler"
    done = forge.run("engine_jobs:launch_with_a_rival", env=places, argv=argv, target=target)
    assert done.code == 2
    assert target in refusal(done)
    assert "another plugin" in refusal(done)


@pytest.fixture
def drifted(tmp_path):
    """A manifest written against other files, with another source of one symbol; and that symbol."""
    text = manifest.manifest_path().read_text(encoding="utf-8")
    symbol, fingerprint = re.search(r'^symbol = "(.+)"\n(?:.+\n)*?fingerprint = "(.+)"$', text, re.M).groups()
    path = tmp_path / "drifted.toml"
    text = text.replace(fingerprint, "0" * len(fingerprint))
    text = re.sub(r'^(sha256 = ").+"$', r'\1of another file"', text, flags=re.M)
    path.write_text(text, encoding="utf-8")
    return str(path), symbol


def test_drift_stops_the_start_and_is_named(forge, argv, places, drifted):
    path, symbol = drifted
    done = forge.run("engine_jobs:launch_with_a_manifest", env=places, argv=argv, path=path)
    assert done.code == 2
    assert symbol in refusal(done)
    assert "--anchor-allow-drift" in refusal(done)


def test_allowed_drift_is_logged_and_the_start_goes_on(forge, argv, places, drifted, public_run_dir):
    path, symbol = drifted
    argv = [*argv, "--anchor-allow-drift", *public_run_dir]
    done = forge.run("engine_jobs:launch_with_a_manifest", env=places, argv=argv, path=path)
    assert f"going on, as --anchor-allow-drift is set: {symbol}" in done.output
    assert "hooks into SGLang 0.5.23 installed and verified" in done.output
    assert "chmod 700" in refusal(done)  # what it comes to next


def test_doctor_finds_this_machine_and_this_sglang_fit():
    done = subprocess.run(
        [sys.executable, "-m", "anchortp_sglang.cli", "doctor", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, checks
    assert {"SGLang", "hooks", "memfd", "pidfd", "handle passing", "run directory"} <= checks.keys()
    assert all(check["level"] != "FAIL" for check in checks.values())


def refusal(done):
    return done.output[done.output.index("anchortp: cannot start: ") :]
