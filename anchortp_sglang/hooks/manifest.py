"""The manifest: the symbols of SGLang that are changed, how and why, with fingerprints of their source.

``python -m anchortp_sglang.hooks --write`` writes ``patches/sglang-<version>.toml`` from the table in
:mod:`anchortp_sglang.hooks.table`. Every start and ``anchortp doctor`` compare it with the installed SGLang. A
difference is called drift.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchortp_sglang.hooks.fingerprint import MissingSymbolError, fingerprint, source_file
from anchortp_sglang.hooks.install import Hook

SGLANG_VERSION = "0.5.23"
_NAME = f"sglang-{SGLANG_VERSION}.toml"
_HEADER = f"""\
# Every symbol of SGLang {SGLANG_VERSION} that anchortp-sglang changes: how, by what, and why.
# `fingerprint` is of the source that the change was written against (comments and formatting do
# not count). A file that is byte for byte the one of [files] need not be parsed.
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


@dataclass(frozen=True)
class Drift:
    """One difference between the manifest, the table of hooks and the installed SGLang."""

    symbol: str
    problem: str

    def __str__(self) -> str:
        return f"{self.symbol}: {self.problem}"


class DriftError(RuntimeError):
    """The installed SGLang differs from the one that the hooks were written for."""

    def __init__(self, drifts: Sequence[Drift]) -> None:
        self.drifts = tuple(drifts)
        lines = "".join(f"\n  {drift}" for drift in drifts)
        super().__init__(
            f"SGLang differs from {_NAME} in {len(self.drifts)} place(s):{lines}\n"
            f"Install sglang=={SGLANG_VERSION}, or start with --anchor-allow-drift at your own risk."
        )


def patches_folder() -> Path:
    """Return the folder of the manifest: beside the code in a wheel, patches/ in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_patches"
    return packaged if (packaged / _NAME).is_file() else package.parent / "patches"


def manifest_path() -> Path:
    """Return the manifest's path."""
    return patches_folder() / _NAME


def write_manifest(hooks: Sequence[Hook], path: Path | None = None) -> Path:
    """Write the manifest of ``hooks`` with fingerprints of the installed SGLang; return its path."""
    path = path or manifest_path()
    entries = sorted((_entry(hook) for hook in hooks), key=lambda entry: (entry.symbol, entry.function))
    text = _HEADER + f"\n[sglang]\nversion = {json.dumps(SGLANG_VERSION)}\n\n[files]\n"
    files = {_name(entry.symbol, source_file(entry.symbol)): _digest(source_file(entry.symbol)) for entry in entries}
    text += "".join(f"{json.dumps(name)} = {json.dumps(digest)}\n" for name, digest in sorted(files.items()))
    for entry in entries:
        # A JSON string is a TOML basic string.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in asdict(entry).items()]
        text += "\n[[hook]]\n" + "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def compare(hooks: Sequence[Hook], path: Path | None = None) -> list[Drift]:
    """Return all drift between ``hooks``, the manifest and the installed SGLang."""
    path = path or manifest_path()
    if not path.is_file():
        return [Drift("sglang", f"the manifest {path} is missing; reinstall anchortp-sglang")]
    entries, files = _read(path)
    in_table = {(hook.target, hook.kind, hook.function_name) for hook in hooks}
    in_manifest = {(entry.symbol, entry.kind, entry.function) for entry in entries}
    drifts = [
        Drift(symbol, f"{kind} hook {function} is not in the manifest")
        for symbol, kind, function in sorted(in_table - in_manifest)
    ]
    drifts += [
        Drift(symbol, f"the manifest names a {kind} hook {function} that does not exist")
        for symbol, kind, function in sorted(in_manifest - in_table)
    ]
    return drifts + _source_drift(entries, files)


def installed_drift(path: Path | None = None) -> list[Drift]:
    """Return drift between the manifest and the installed SGLang, without importing SGLang."""
    path = path or manifest_path()
    if not path.is_file():
        return [Drift("sglang", f"the manifest {path} is missing; reinstall anchortp-sglang")]
    return _source_drift(*_read(path))


def _entry(hook: Hook) -> Entry:
    return Entry(hook.target, hook.kind, hook.function_name, hook.why, fingerprint(hook.target))


def _read(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """Read the hooks, and the digests of the files that they change."""
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Entry(**hook) for hook in found.get("hook", [])], found.get("files", {})


def _name(symbol: str, file: Path) -> str:
    """Return the file's path below its package's parent, its name in the manifest."""
    package, path = symbol.partition(".")[0], file.as_posix()
    return f"{package}/{path.rpartition(f'/{package}/')[2]}"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _source_drift(entries: Iterable[Entry], files: Mapping[str, str]) -> list[Drift]:
    """Compare fingerprints. ``files``: the manifest's digests; unchanged files are not parsed, which takes a second."""
    drifts = []
    unchanged: dict[Path, bool] = {}
    installed = installed_version()
    if installed != SGLANG_VERSION:
        drifts.append(Drift("sglang", f"written for version {SGLANG_VERSION}, installed is {installed}"))
    for symbol, written_for in dict.fromkeys((entry.symbol, entry.fingerprint) for entry in entries):
        try:
            file = source_file(symbol)
            if file not in unchanged:
                unchanged[file] = _digest(file) == files.get(_name(symbol, file))
            if unchanged[file]:
                continue
            now = fingerprint(symbol)
        except MissingSymbolError as error:
            drifts.append(Drift(symbol, f"missing: {error}"))
            continue
        if now != written_for:
            drifts.append(Drift(symbol, f"its source has changed ({written_for} -> {now})"))
    return drifts


def installed_version() -> str:
    """Return the version of the installed SGLang, or "none"."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "none"
