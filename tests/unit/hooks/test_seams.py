"""A fork without SGLang's plugin system: its patched source has seams, which hooks fill."""

import importlib
import subprocess
import sys

import pytest

from anchortp_sglang.hooks import seams
from anchortp_sglang.hooks.install import Hook, HookError, install, load_plugins
from anchortp_sglang.hooks.manifest import Drift, compare, patches_folder, read_manifest, write_manifest

TOY = '''"""A fork."""

from __future__ import annotations

import functools


def double(value):
    return 2 * value


async def later(value):
    return value


class Engine:
    def start(self, port):
        return f"started {port}"

    @classmethod
    def name(cls):
        return cls.__name__

    @staticmethod
    @functools.cache
    def version():
        return 1
'''

SEAM = "sglang.srt.anchortp_seam"


def around_double(original, value):
    return original(value) + 1


def before_start(self, port):
    return (self, port + 1), {}


def after_name(result, cls):
    return result.upper()


def replace_version():
    return 2


HOOKS = (
    Hook("sglang.work.double", "around", around_double, "one more"),
    Hook("sglang.work.later", "around", around_double, "later"),
    Hook("sglang.work.Engine.start", "before", before_start, "the next port"),
    Hook("sglang.work.Engine.name", "after", after_name, "louder"),
    Hook("sglang.work.Engine.version", "replace", replace_version, "newer"),
)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """The folder of a package ``sglang`` without plugins, found before the installed one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "python" / "sglang"
    (package / "srt").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text(TOY)
    (package / "user.py").write_text("from sglang.work import double\n")
    monkeypatch.syspath_prepend(str(package.parent))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        del sys.modules[name]


@pytest.fixture
def patched(fork, tmp_path):
    """Patch the fork as docs/forks.md says; return its folder."""
    (tmp_path / "seams.patch").write_text(seams.patch_text(hook.target for hook in HOOKS))
    subprocess.run(["git", "apply", "seams.patch"], cwd=tmp_path, check=True)
    importlib.invalidate_caches()
    return fork


def test_seams_are_inside_method_kinds_and_around_other_decorators(patched):
    source = (patched / "work.py").read_text()
    assert f"from {SEAM} import anchortp_seam\nimport functools\n" in source
    assert "    @classmethod\n    @anchortp_seam\n    def name" in source
    assert "    @staticmethod\n    @anchortp_seam\n    @functools.cache\n" in source
    assert "@anchortp_seam\nasync def later" in source


def test_a_patched_fork_is_as_it_was_until_hooks_fill_its_seams(patched):
    user = importlib.import_module("sglang.user")
    work = sys.modules["sglang.work"]
    assert (user.double(2), work.Engine().start(1), work.Engine.name(), work.Engine.version()) == (
        4,
        "started 1",
        "Engine",
        1,
    )
    for _ in range(2):  # again changes nothing
        install(HOOKS)
        hooked = (user.double(2), work.Engine().start(1), work.Engine.name(), work.Engine.version())
        assert hooked == (5, "started 2", "ENGINE", 2)
    load_plugins()  # there are none


def test_a_seam_is_no_drift(fork, tmp_path):
    path = write_manifest(HOOKS, tmp_path / "m.toml")
    (tmp_path / "seams.patch").write_text(seams.patch_text(hook.target for hook in HOOKS))
    subprocess.run(["git", "apply", "seams.patch"], cwd=tmp_path, check=True)
    assert compare(HOOKS, path) == []
    (fork / "work.py").write_text((fork / "work.py").read_text().replace("2 * value", "3 * value"))
    assert len(compare(HOOKS, path)) == 1


def test_a_decorator_around_a_seam_is_no_seam(patched):
    work = importlib.import_module("sglang.work")
    import functools

    seam = work.double
    work.double = functools.wraps(seam)(lambda value: -value)
    with pytest.raises(HookError, match=r"sglang\.work\.double: SGLang has neither its plugin system nor a seam"):
        install(HOOKS)


def test_a_patched_fork_needs_no_other_patch(patched, monkeypatch):
    from anchortp_sglang.hooks import __main__ as command

    assert seams.is_patched()
    monkeypatch.setattr(command, "flags_text", lambda: "")
    assert [path.suffix for path in command._texts(HOOKS)] == [".toml", ".toml"]


@pytest.mark.parametrize(
    ("drifts", "version", "refusal"),
    [
        ([], "0.5.23", ""),
        ([Drift("a", "changed", breaks=False)], "0.5.24", ""),
        ([Drift("a", "changed", breaks=False)], "0.5.23", "another source than SGLang 0.5.23"),
        ([Drift("a", "missing")], "0.5.24", "lack what they need"),
    ],
)
def test_what_breaks_a_hook_and_another_source_of_the_same_version_are_not_written(
    monkeypatch, capsys, drifts, version, refusal
):
    from anchortp_sglang.hooks import __main__ as command

    monkeypatch.setattr(command.manifest, "installed_drift", lambda path: drifts)
    monkeypatch.setattr(command.manifest, "installed_version", lambda: version)
    found = command._accept()
    assert refusal in found and bool(found) is bool(refusal)
    assert capsys.readouterr().err.count("accepted: a") == len(drifts)


def test_a_fork_with_neither_is_told_of_the_patch(fork):
    with pytest.raises(HookError, match=r"5 hook\(s\).*\n.*apply the patch of docs/forks\.md"):
        install(HOOKS)


def test_the_shipped_patch_is_of_the_installed_sglang():
    """Renew it with ``python -m anchortp_sglang.hooks --write``."""
    shipped = (patches_folder() / "sglang-0.5.23.patch").read_text()
    assert shipped == seams.patch_text(entry.symbol for entry in read_manifest().entries)
