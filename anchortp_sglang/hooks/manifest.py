"""The manifest: the symbols of SGLang that are changed, how and why, with what is known of their source.

``python -m anchortp_sglang.hooks --write`` writes ``patches/sglang-<version>.toml`` from the table in
:mod:`anchortp_sglang.hooks.table`, for the release or for an installed fork. Every start and ``anchortp doctor``
compare it with the installed SGLang. A difference is called drift.
"""

from __future__ import annotations

import contextlib
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
from anchortp_sglang.hooks.names import defined_names, package_imports, package_names, used_names
from anchortp_sglang.hooks.source import MissingSymbolError, package_folder, read_symbol, source_file

SGLANG_VERSION = "0.5.23"
VERSION = "sglang"
"""Stands for SGLang's version where symbols are named (``--anchor-allow-drift sglang``)."""

_HEADER = """\
# Every symbol of SGLang {version} that anchortp-sglang changes: how, by what, and why.
# `fingerprint` and `parameters` are of the source that the change was written against (comments
# and formatting do not count). [files] has the files that are changed or imported from, with the
# names that they define and anchortp-sglang uses; one that is byte for byte the same is not parsed.
# Generated: `python -m anchortp_sglang.hooks --write`, after reading what changed.
"""


@dataclass(frozen=True)
class Entry:
    """One hook in the manifest."""

    symbol: str
    kind: str
    function: str
    why: str
    fingerprint: str
    parameters: str


@dataclass(frozen=True)
class Drift:
    """One difference between the manifest, the table of hooks and an SGLang.

    ``symbol`` may also be a file, or ``VERSION``. ``breaks``: something that we need is not there, or is called in
    another way; else only the body of the symbol differs.
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


def write_manifest(hooks: Sequence[Hook], path: Path) -> Path:
    """Write the manifest of ``hooks`` to ``path``; return it. Raises :class:`MissingSymbolError` and OSError."""
    path.write_text(manifest_text(hooks), encoding="utf-8")
    return path


def manifest_text(hooks: Sequence[Hook]) -> str:
    """Return the manifest of ``hooks`` with what the installed SGLang has. Raises :class:`MissingSymbolError`."""
    version = installed_version()
    text = _HEADER.format(version=version) + f"\n[sglang]\nversion = {json.dumps(version)}\n"
    for name, file in sorted(_files(hooks).items()):
        names = sorted(defined_names(file) & (package_names() | _names_of(hooks)))
        text += f"\n[files.{json.dumps(name)}]\nsha256 = {json.dumps(_digest(file))}\nnames = {json.dumps(names)}\n"
    for entry in sorted(map(_entry, hooks), key=lambda entry: (entry.symbol, entry.function)):
        # A JSON string is a TOML basic string.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in asdict(entry).items()]
        text += "\n[[hook]]\n" + "\n".join(lines) + "\n"
    return text


def _files(hooks: Sequence[Hook]) -> dict[str, Path]:
    """Return the installed files that are hooked or imported from, by their names in the manifest."""
    found = {}
    for symbol in [*(hook.target for hook in hooks), *(".".join(each) for each in package_imports() if each[1])]:
        with contextlib.suppress(MissingSymbolError):
            file = source_file(symbol)
            found[_name(symbol, file)] = file
    return found


def _names_of(hooks: Sequence[Hook]) -> frozenset[str]:
    """Return the names that the hooks' own functions use."""
    return frozenset[str]().union(*(used_names(_file_of(hook), hook.function.__qualname__) for hook in hooks))


def _file_of(hook: Hook) -> Path:
    file = inspect.getsourcefile(hook.function)
    assert file is not None, f"{hook.function_name} has no source file"
    return Path(file)


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
    path = manifest_path()
    if not path.is_file():
        raise DriftError(drifts)
    if allowed is True:
        return list(drifts)
    names, manifest = set(allowed or ()), _read(path)
    known = {VERSION, *manifest.files, *(entry.symbol for entry in manifest.entries), *(d.symbol for d in drifts)}
    if unknown := sorted(names - known):
        raise ValueError(f"--anchor-allow-drift: no hook changes {', '.join(unknown)}; see {path}")
    if refused := [drift for drift in drifts if drift.symbol not in names]:
        raise DriftError(refused)
    return list(drifts)


@dataclass(frozen=True)
class File:
    """A file that is hooked or imported from: its sha256, and the names that it defines and we use."""

    sha256: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A manifest as read. ``files``: by path below the package's parent."""

    version: str
    files: Mapping[str, File]
    entries: tuple[Entry, ...]


def read_manifest() -> Manifest:
    """Return the manifest of the release."""
    return _read(patches_folder() / f"sglang-{SGLANG_VERSION}.toml")


def _read(path: Path) -> Manifest:
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    files = {name: File(file["sha256"], tuple(file["names"])) for name, file in found.get("files", {}).items()}
    return Manifest(found["sglang"]["version"], files, tuple(Entry(**hook) for hook in found.get("hook", [])))


def _missing(path: Path) -> Drift:
    return Drift(VERSION, f"the manifest {path} is missing; reinstall anchortp-sglang")


def _entry(hook: Hook) -> Entry:
    symbol = read_symbol(hook.target)
    return Entry(hook.target, hook.kind, hook.function_name, hook.why, symbol.fingerprint, symbol.parameters)


def _name(symbol: str, file: Path, tree: Path | None = None) -> str:
    """Return the path of a symbol's file below its top package's parent, as ``sglang/srt/utils/common.py``."""
    package = symbol.partition(".")[0]
    return f"{package}/{file.relative_to(tree or package_folder(package)).as_posix()}"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def source_drift(manifest: Manifest, tree: Path | None = None) -> list[Drift]:
    """Return how an SGLang differs from the manifest. ``tree``: its package's folder, None if installed.

    Files that are as they were are not parsed, which takes seconds. Raises SyntaxError and OSError for others that
    cannot be.
    """
    drifts: list[Drift] = []
    same = {name for name, file in manifest.files.items() if _is_same(_path(name, tree), file)}
    for entry in manifest.entries:
        try:
            file = source_file(entry.symbol, tree)
            if _name(entry.symbol, file, tree) not in same:
                drifts += _symbol_drift(entry, tree)
        except MissingSymbolError as error:
            drifts.append(Drift(entry.symbol, f"missing: {error}"))
    for name in manifest.files.keys() - same:
        drifts += _file_drift(name, manifest.files[name], _path(name, tree))
    return drifts


def _path(name: str, tree: Path | None) -> Path:
    """Return the path of a file by its name in the manifest."""
    package, _, rest = name.partition("/")
    return (tree or package_folder(package)) / rest


def _is_same(path: Path, file: File) -> bool:
    return path.is_file() and _digest(path) == file.sha256


def _symbol_drift(entry: Entry, tree: Path | None) -> Iterable[Drift]:
    """Judge one symbol for itself. Raises :class:`MissingSymbolError`."""
    now = read_symbol(entry.symbol, tree)
    if now.parameters != entry.parameters:
        yield Drift(entry.symbol, f"its parameters were {entry.parameters} and are {now.parameters}")
    elif now.fingerprint != entry.fingerprint:
        change = f"its source has changed ({entry.fingerprint} -> {now.fingerprint}), not its parameters"
        yield Drift(entry.symbol, change, breaks=False)


def _file_drift(name: str, file: File, path: Path) -> Iterable[Drift]:
    lost = sorted(set(file.names) - defined_names(path)) if path.is_file() else file.names
    if lost:
        yield Drift(name, f"does not define {', '.join(lost)}, which anchortp-sglang uses")


def installed_version() -> str:
    """Return the version of the installed SGLang, or "none"."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "none"
