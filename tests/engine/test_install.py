"""The wheel: what `pip install .` puts beside an installed SGLang, and that it works from there."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("anchortp_sglang", "patches", "pyproject.toml", "setup.py", "LICENSE", "README.md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package installed from its wheel; nothing of the checkout is on its path."""
    folder = tmp_path_factory.mktemp("install")
    source, wheels, target = folder / "source", folder / "wheels", folder / "target"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).exists():
            shutil.copy(ROOT / part, source / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(source)])
    (wheel,) = wheels.glob("anchortp_sglang-*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return target


def run(command, path=None):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_names_its_command_and_its_requirements(installed):
    (distribution,) = distributions(name="anchortp-sglang", path=[str(installed)])
    commands = distribution.entry_points.select(group="console_scripts")
    assert [(command.name, command.value) for command in commands] == [("anchortp", "anchortp_sglang.cli.app:main")]
    assert "sglang==0.5.23" in distribution.requires
    assert {path.parts[0] for path in distribution.files} <= {"..", "anchortp_sglang", *_info(distribution)}


def _info(distribution):
    return {path.parts[0] for path in distribution.files if path.name == "METADATA"}


def test_the_installed_package_finds_its_manifest(installed):
    code = "from anchortp_sglang.hooks import manifest; print(manifest.manifest_path(), manifest.installed_drift())"
    assert run([sys.executable, "-c", code], installed).split() == [
        str(installed / "anchortp_sglang" / "_patches" / "sglang-0.5.23.toml"),
        "[]",
    ]


def test_the_command_runs_from_the_installed_package(installed):
    assert "doctor" in run([sys.executable, "-m", "anchortp_sglang.cli", "--help"], installed)


def test_help_shows_sglangs_flags_and_a_group_of_our_own(installed):
    text = run([sys.executable, "-m", "anchortp_sglang.launch_server", "--help"], installed)
    assert "--model-path" in text
    ours = text[text.index("\nanchortp:") :]
    assert "--anchor-widths N,N,..." in ours
    assert "--model-path" not in ours
