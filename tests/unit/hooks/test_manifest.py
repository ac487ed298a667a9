"""Drift is noticed: fingerprints of source, and the manifest that keeps them. Nothing is imported for it."""

import sys

import pytest

from anchortp_sglang.hooks import manifest
from anchortp_sglang.hooks.fingerprint import MissingSymbolError, fingerprint
from anchortp_sglang.hooks.install import Hook
from anchortp_sglang.hooks.manifest import compare, installed_drift, write_manifest

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


def test_a_fresh_manifest_shows_no_drift(toy, tmp_path):
    path = write_manifest(HOOKS, tmp_path / "m.toml")
    assert compare(HOOKS, path) == []
    assert write_manifest(HOOKS, tmp_path / "n.toml").read_text() == path.read_text()


def test_text_survives_the_manifest(toy, tmp_path):
    hook = Hook("toy.work.double", "around", around_double, 'says "no", \\ and\nmore – ü')
    (entry,), _ = manifest._read(write_manifest([hook], tmp_path / "m.toml"))
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
    monkeypatch.setattr(manifest, "installed_version", lambda: "0.6.0")
    (drift,) = compare((), write_manifest((), tmp_path / "m.toml"))
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
    assert '"toy/work.py" = ' in path.read_text()
    parsed = []
    monkeypatch.setattr(manifest, "fingerprint", lambda symbol: parsed.append(symbol) or fingerprint(symbol))
    assert compare(hooks, path) == [] and parsed == []
    toy.write_text(TOY + "# a comment more\n")
    assert compare(hooks, path) == [] and parsed == ["toy.work.double"], "another file with the same symbol is parsed"
    toy.write_text(TOY.replace("2 * value", "3 * value"))
    assert "has changed" in str(compare(hooks, path)[0])
