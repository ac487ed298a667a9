"""The manifest: the symbols of SGLang that are changed, how and why, with what is known of their source.

``python -m anchortp_sglang.hooks --write`` writes ``patches/sglang-<version>.toml`` from the table in
:mod:`anchortp_sglang.hooks.table`, for the release or for an installed fork. Every start and ``anchortp doctor``
compare it with the installed SGLang. A difference is called drift.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchortp_sglang.hooks.install import Hook
from anchortp_sglang.hooks.names import defined_names, used_names
from anchortp_sglang.hooks.source import MissingSymbolError, package_folder, read_symbol, source_file

SGLANG_VERSION = "0.5.23"
VERSION = "sglang"
"""Stands for SGLang's version where symbols are named (``--anchor-allow-drift sglang``)."""

_HEADER = """\
# Every symbol of SGLang {version} that anchortp-sglang changes: how, by what, and why.
# `fingerprint` is of the source that the change was written against (comments and formatting do
# not count), `parameters` are its own, and `relies_on` are names that the change uses and that
# SGLang's files below define. A file that is byte for byte the one of [files] need not be parsed.
# Generated: `python -m anchortp_sglang.hooks --write`, after reading what changed.
"""


_OF_PYTHON = frozenset(name for kind in (type, str, bytes, list, dict, set) for name in dir(kind))


@dataclass(frozen=True)
class Entry:
    """One hook in the manifest."""

    symbol: str
    kind: str
    function: str
    why: str
    fingerprint: str
    parameters: str
    relies_on: tuple[str, ...]


@dataclass(frozen=True)
class Drift:
    """One difference between the manifest, the table of hooks and an SGLang.

    ``breaks``: the hook lacks something that it needs; else only the body of the symbol differs.
    """

    symbol: str
    problem: str
    breaks: bool = True

    def __str__(self) -> str:
        return f"{self.symbol}: {self.problem}"


class DriftError(RuntimeError):
    """The installed SGLang differs from the one that the hooks were written for."""

    def __init__(self, drifts: Sequence[Drift]) -> None:
        self.drifts = tuple(drifts)
        lines = "".join(f"\n  {drift}" for drift in drifts)
        symbols = ",".join(dict.fromkeys(drift.symbol for drift in drifts))
        super().__init__(
            f"SGLang differs from {manifest_path().name} in {len(self.drifts)} place(s):{lines}\n"
            f"Install sglang=={SGLANG_VERSION}. For a fork, read docs/forks.md. What you have judged to be harmless may"
            f" pass: --anchor-allow-drift {symbols}"
        )


def patches_folder() -> Path:
    """Return the folder of the manifests: beside the code in a wheel, patches/ in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_patches"
    return packaged if (packaged / f"sglang-{SGLANG_VERSION}.toml").is_file() else package.parent / "patches"


def known_version() -> str:
    """Return the installed SGLang's version if there is a manifest for it, else the release's."""
    installed = installed_version()
    return installed if (patches_folder() / f"sglang-{installed}.toml").is_file() else SGLANG_VERSION


def manifest_path() -> Path:
    """Return the path of the manifest that the installed SGLang is compared with."""
    return patches_folder() / f"sglang-{known_version()}.toml"


def write_manifest(hooks: Sequence[Hook], path: Path | None = None) -> Path:
    """Write the manifest of ``hooks`` with what the installed SGLang has; return its path.

    Raises :class:`MissingSymbolError` and OSError.
    """
    version = installed_version()
    path = path or patches_folder() / f"sglang-{version}.toml"
    files = {_name(hook.target, source_file(hook.target)): source_file(hook.target) for hook in hooks}
    defined = frozenset[str]().union(*map(defined_names, files.values()))
    entries = sorted((_entry(hook, defined) for hook in hooks), key=lambda entry: (entry.symbol, entry.function))
    text = _HEADER.format(version=version) + f"\n[sglang]\nversion = {json.dumps(version)}\n\n[files]\n"
    text += "".join(f"{json.dumps(name)} = {json.dumps(_digest(file))}\n" for name, file in sorted(files.items()))
    for entry in entries:
        # A JSON string is a TOML basic string, a JSON list of them a TOML array.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in asdict(entry).items()]
        text += "\n[[hook]]\n" + "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def compare(hooks: Sequence[Hook], path: Path | None = None) -> list[Drift]:
    """Return all drift between ``hooks``, the manifest and the installed SGLang."""
    path = path or manifest_path()
    if not path.is_file():
        return [_missing(path)]
    in_table = {(hook.target, hook.kind, hook.function_name) for hook in hooks}
    in_manifest = {(entry.symbol, entry.kind, entry.function) for entry in _read(path).entries}
    drifts = [
        Drift(symbol, f"{kind} hook {function} is not in the manifest")
        for symbol, kind, function in sorted(in_table - in_manifest)
    ]
    drifts += [
        Drift(symbol, f"the manifest names a {kind} hook {function} that does not exist")
        for symbol, kind, function in sorted(in_manifest - in_table)
    ]
    return drifts + installed_drift(path)


def installed_drift(path: Path | None = None) -> list[Drift]:
    """Return drift between the manifest and the installed SGLang, without importing SGLang."""
    path = path or manifest_path()
    if not path.is_file():
        return [_missing(path)]
    manifest = _read(path)
    drifts = source_drift(manifest)
    if (installed := installed_version()) != manifest.version:
        drifts.insert(0, Drift(VERSION, f"written for version {manifest.version}, installed is {installed}", False))
    return drifts


def allow(drifts: Sequence[Drift], allowed: bool | Collection[str]) -> list[Drift]:
    """Return the drift that the operator allows: all of it (True) or that of the named symbols.

    Raises :class:`DriftError` with the rest, and ValueError for a name that is no hooked symbol.
    """
    if allowed is True:
        return list(drifts)
    names = set(allowed or ())
    known = {VERSION} | {entry.symbol for entry in _read(manifest_path()).entries} | {d.symbol for d in drifts}
    if unknown := sorted(names - known):
        raise ValueError(f"--anchor-allow-drift: no hook changes {', '.join(unknown)}; see {manifest_path()}")
    if refused := [drift for drift in drifts if drift.symbol not in names]:
        raise DriftError(refused)
    return list(drifts)


@dataclass(frozen=True)
class Manifest:
    """A manifest as read. ``files``: by path below the package's parent, the sha256 of a file that is hooked."""

    version: str
    files: Mapping[str, str]
    entries: tuple[Entry, ...]


def read_manifest() -> Manifest:
    """Return the manifest of the release."""
    return _read(patches_folder() / f"sglang-{SGLANG_VERSION}.toml")


def _read(path: Path) -> Manifest:
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    entries = tuple(Entry(**{**hook, "relies_on": tuple(hook["relies_on"])}) for hook in found.get("hook", []))
    return Manifest(found["sglang"]["version"], found.get("files", {}), entries)


def _missing(path: Path) -> Drift:
    return Drift(VERSION, f"the manifest {path} is missing; reinstall anchortp-sglang")


def _entry(hook: Hook, defined: frozenset[str]) -> Entry:
    symbol = read_symbol(hook.target)
    file = inspect.getsourcefile(hook.function)
    assert file is not None, f"{hook.function_name} has no source file"
    used = used_names(Path(file), hook.function.__qualname__) - _OF_PYTHON
    relies_on = tuple(sorted(used & defined))
    return Entry(hook.target, hook.kind, hook.function_name, hook.why, symbol.fingerprint, symbol.parameters, relies_on)


def _name(symbol: str, file: Path, tree: Path | None = None) -> str:
    """Return the path of a symbol's file below its top package's parent, as ``sglang/srt/utils/common.py``."""
    package = symbol.partition(".")[0]
    return f"{package}/{file.relative_to(tree or package_folder(package)).as_posix()}"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def source_drift(manifest: Manifest, tree: Path | None = None) -> list[Drift]:
    """Return how the hooked symbols of an SGLang differ from the manifest. ``tree``: its package, None if installed.

    Files that are as they were are not parsed, which takes seconds.
    """
    files: dict[str, Path] = {}
    drifts = []
    for entry in manifest.entries:
        try:
            files[entry.symbol] = source_file(entry.symbol, tree)
        except MissingSymbolError as error:
            drifts.append(Drift(entry.symbol, f"missing: {error}"))
    names = {file: _name(symbol, file, tree) for symbol, file in files.items()}
    differ = {file for file, name in names.items() if _digest(file) != manifest.files.get(name)}
    if not differ:
        return drifts
    defined = frozenset[str]().union(*map(defined_names, set(files.values())))
    for entry in manifest.entries:
        if entry.symbol in files:
            drifts += _symbol_drift(entry, tree, defined, is_parsed=files[entry.symbol] in differ)
    return drifts


def _symbol_drift(entry: Entry, tree: Path | None, defined: frozenset[str], is_parsed: bool) -> Iterable[Drift]:
    """Judge one symbol for itself: is it there, are its parameters the same, is what the hook relies on defined?"""
    if lost := [name for name in entry.relies_on if name not in defined]:
        yield Drift(entry.symbol, f"{entry.function} uses {', '.join(lost)}, which SGLang's hooked files do not define")
    if not is_parsed:
        return
    try:
        now = read_symbol(entry.symbol, tree)
    except MissingSymbolError as error:
        yield Drift(entry.symbol, f"missing: {error}")
        return
    if now.parameters != entry.parameters:
        yield Drift(entry.symbol, f"its parameters were {entry.parameters} and are {now.parameters}")
    elif now.fingerprint != entry.fingerprint:
        yield Drift(
            entry.symbol,
            f"its source has changed ({entry.fingerprint} -> {now.fingerprint}), not its parameters",
            breaks=False,
        )


def installed_version() -> str:
    """Return the version of the installed SGLang, or "none"."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "none"
