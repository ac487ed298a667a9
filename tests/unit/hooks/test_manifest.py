"""Drift is noticed: fingerprints of source, and the manifest that keeps them. Nothing is imported for it."""

import sys

import pytest

from anchortp_sglang.hooks import manifest
from anchortp_sglang.hooks.install import Hook
from anchortp_sglang.hooks.manifest import DriftError, allow, compare, installed_drift, write_manifest
from anchortp_sglang.hooks.names import package_names
from anchortp_sglang.hooks.source import MissingSymbolError, fingerprint, read_symbol

TOY = '''
"""A module to be changed."""
import functools

def double(value):
    """Twice."""
    return 2 * value  # exactly

if functools:
    def chosen():
        return "a"
else:
    def chosen():
        return "b"

class Engine:
    def start(self, port):
        return f"started {port}"

    @staticmethod
    def version():
        return 1

class Child(Engine):
    pass
'''

TRICKY = """
@wrapped(depth=None)
async def tricky(a, /, b: int = -1, *args, key="k", **rest) -> None:
    text = f"{a!r:>{b}} {'x' if (n := len(args)) else f'{key}'}"
    match a:
        case {"k": [1, *_], **others} if others:
            return None
    try:
        await rest["f"](*args, **{**rest, "t": (1.5, b"z", ..., True)})
    except* OSError as error:
        return lambda: text[1:n, ...] if error else None
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The file of ``toy.work`` in a package that can be found, and is never imported."""
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text(TOY)
    (package / "user.py").write_text("from toy.work import double\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package / "work.py"
    assert not {"toy", "toy.work"} & set(sys.modules)


def around_double(original, value):
    return original(value) + 1


def around_double_by_an_engine(original, value):
    return value.start(original)


def before_start(self, port):
    return (self, port + 1), {}


def replace_version():
    return 2


HOOKS = (
    Hook("toy.work.double", "around", around_double, "one more"),
    Hook("toy.work.Engine.start", "before", before_start, "the next port"),
    Hook("toy.work.Engine.version", "replace", replace_version, "newer"),
)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # exactly", "", True),
        ("2 * value", "2*value", True),
        ('    """Twice."""\n', "", True),
        ("2 * value", "value * 2", False),
        ("def double(value)", "def double(value, times=1)", False),
        ("def double(value)", "@functools.cache\ndef double(value)", False),
        ('return "b"', 'return "c"', True),
    ],
)
def test_a_fingerprint_changes_with_the_code_and_only_with_it(toy, old, new, same):
    before = fingerprint("toy.work.double")
    assert old in TOY
    toy.write_text(TOY.replace(old, new))
    assert (fingerprint("toy.work.double") == before) is same


def test_a_fingerprint_covers_every_branch_that_defines_the_symbol(toy):
    before = fingerprint("toy.work.chosen")
    toy.write_text(TOY.replace('return "b"', 'return "c"'))
    assert fingerprint("toy.work.chosen") != before


def test_fingerprints_are_the_same_on_every_python(toy):
    """Recorded on 3.11. ast.dump, for one, gives another value from 3.12 on (type_params)."""
    toy.write_text(TRICKY)
    assert fingerprint("toy.work.tricky") == "6953c7d8d3b9cc39"


@pytest.mark.parametrize(
    "target",
    [
        "toy.work.Child.start",
        "toy.user.double",
        "toy.work.nope",
        "toy.nope.x",
        "no_such_package.x",
        "toy.work.Engine.nope",
    ],
)
def test_a_symbol_that_is_not_defined_there_has_no_fingerprint(toy, target):
    with pytest.raises(MissingSymbolError):
        fingerprint(target)


@pytest.mark.parametrize(
    ("old", "new", "problem", "breaks"),
    [
        ("2 * value", "3 * value", "its source has changed", False),
        ("double(value)", "double(value: int)", "its source has changed", False),
        ("double(value)", "double(value, times=2)", "its parameters were (value) and are (value, times=2)", True),
        ("def double", "def twice", "missing: double is not defined in the module", True),
        ("def double", "async def double", "its parameters were (value) and are async (value)", True),
    ],
)
def test_a_symbol_is_judged_for_itself(toy, tmp_path, old, new, problem, breaks):
    """A changed body, other parameters, a lost symbol."""
    hooks = [Hook("toy.work.double", "around", around_double, "why")]
    path = write_manifest(hooks, tmp_path / "m.toml")
    assert old in TOY
    toy.write_text(TOY.replace(old, new))
    (drift,) = compare(hooks, path)
    assert (drift.symbol, drift.breaks) == ("toy.work.double", breaks)
    assert problem in drift.problem


def test_names_that_a_hook_uses_are_missed_in_their_file(toy, tmp_path):
    hooks = [Hook("toy.work.double", "around", around_double_by_an_engine, "why")]
    path = write_manifest(hooks, tmp_path / "m.toml")
    toy.write_text(TOY.replace("def start", "def begin"))
    (drift,) = compare(hooks, path)
    assert (drift.symbol, drift.breaks) == ("toy/work.py", True)
    assert drift.problem == "does not define start, which anchortp-sglang uses"
    assert allow([drift], True) == [drift]


def test_names_are_those_that_the_package_uses_and_does_not_define_itself():
    names = package_names()
    assert {"rid_to_state", "abort_sent", "tree_cache", "retracted_stain"} <= names
    assert not {"prefixes", "append", "split", "rank_pid"} & names


def test_drift_is_allowed_by_symbol(toy, tmp_path, monkeypatch):
    path = write_manifest(HOOKS, tmp_path / "m.toml")
    monkeypatch.setattr(manifest, "manifest_path", lambda: path)
    toy.write_text(TOY.replace("2 * value", "3 * value").replace("return 1", "return 3"))
    drifts = compare(HOOKS)
    assert len(drifts) == 2
    assert allow(drifts, True) == allow(drifts, ["toy.work.double", "toy.work.Engine.version"]) == drifts
    with pytest.raises(DriftError, match=r"in 1 place\(s\):\n  toy.work.Engine.version") as refused:
        allow(drifts, ["toy.work.double", "sglang"])
    assert "--anchor-allow-drift toy.work.Engine.version" in str(refused.value)
    with pytest.raises(ValueError, match=r"no hook changes toy\.work\.dubble"):
        allow(drifts, ["toy.work.dubble"])
    with pytest.raises(DriftError):
        allow(drifts, False)
    path.unlink()
    for allowed in (True, ["sglang"]):
        with pytest.raises(DriftError, match="is missing"):
            allow(compare(HOOKS), allowed)


def test_a_fork_has_its_own_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "patches_folder", lambda: tmp_path)
    monkeypatch.setattr(manifest, "installed_version", lambda: "0.5.23+ours")
    assert manifest.manifest_path().name == "sglang-0.5.23.toml"
    path = write_manifest((), tmp_path / "sglang-0.5.23+ours.toml")
    assert "written for" not in str(compare((), path))
    assert manifest.manifest_path().name == "sglang-0.5.23+ours.toml"


def test_a_fresh_manifest_shows_no_drift(toy, tmp_path):
    path = write_manifest(HOOKS, tmp_path / "m.toml")
    assert compare(HOOKS, path) == []
    assert write_manifest(HOOKS, tmp_path / "n.toml").read_text() == path.read_text()


def test_text_survives_the_manifest(toy, tmp_path):
    hook = Hook("toy.work.double", "around", around_double, 'says "no", \\ and\nmore – ü')
    (entry,) = manifest._read(write_manifest([hook], tmp_path / "m.toml")).entries
    assert entry.why == hook.why
    assert entry.function == f"{__name__}.around_double"


def test_drift_names_changed_and_missing_symbols(toy, tmp_path):
    path = write_manifest(HOOKS, tmp_path / "m.toml")
    toy.write_text(TOY.replace("2 * value", "3 * value").replace("def version", "def edition"))
    for drifts in (compare(HOOKS, path), installed_drift(path)):
        assert {drift.symbol for drift in drifts} == {"toy.work.double", "toy.work.Engine.version"}
        problem = {drift.symbol: drift.problem for drift in drifts}
        assert "its source has changed" in problem["toy.work.double"]
        assert "missing: version is not defined in class Engine" in problem["toy.work.Engine.version"]


def test_drift_names_hooks_and_entries_without_their_other_half(toy, tmp_path):
    path = write_manifest(HOOKS[:-1], tmp_path / "m.toml")
    (drift,) = compare(HOOKS, path)
    assert (drift.symbol, "is not in the manifest" in drift.problem) == ("toy.work.Engine.version", True)
    (drift,) = compare(HOOKS[1:-1], path)
    assert (drift.symbol, "does not exist" in drift.problem) == ("toy.work.double", True)


def test_another_sglang_version_and_a_missing_manifest_are_drift(tmp_path, monkeypatch):
    assert "is missing" in str(compare((), tmp_path / "none.toml")[0])
    path = write_manifest((), tmp_path / "m.toml")
    monkeypatch.setattr(manifest, "installed_version", lambda: "0.6.0")
    (drift,) = compare((), path)
    assert str(drift) == "sglang: written for version 0.5.23, installed is 0.6.0"


def test_the_shipped_manifest_agrees_with_the_installed_sglang():
    assert [str(drift) for drift in installed_drift()] == []


def test_a_wheel_carries_its_manifest(tmp_path, monkeypatch):
    packaged = tmp_path / "pkg" / "_patches" / "sglang-0.5.23.toml"
    packaged.parent.mkdir(parents=True)
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "pkg" / "hooks" / "manifest.py"))
    assert manifest.manifest_path() == tmp_path / "patches" / "sglang-0.5.23.toml"
    packaged.write_text("")
    assert manifest.manifest_path() == packaged


def test_files_that_are_as_they_were_are_not_parsed(toy, tmp_path, monkeypatch):
    hooks = [Hook("toy.work.double", "around", around_double, "why")]
    path = write_manifest(hooks, tmp_path / "m.toml")
    assert '"toy/work.py"' in path.read_text()
    parsed = []
    read = lambda symbol, tree: parsed.append(symbol) or read_symbol(symbol, tree)  # noqa: E731
    monkeypatch.setattr(manifest, "read_symbol", read)
    assert compare(hooks, path) == [] and parsed == []
    toy.write_text(TOY + "# a comment more\n")
    assert compare(hooks, path) == [] and parsed == ["toy.work.double"], "another file with the same symbol is parsed"
    toy.write_text(TOY.replace("2 * value", "3 * value"))
    assert "has changed" in str(compare(hooks, path)[0])
