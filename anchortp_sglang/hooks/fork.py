"""Judges a fork's source tree: would the hooks take, and is there all that this package imports? Nothing is run."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from anchortp_sglang.hooks.manifest import Drift, read_manifest, source_drift
from anchortp_sglang.hooks.names import bound_names, package_imports
from anchortp_sglang.hooks.source import MissingSymbolError, has_seam

_PLACES = ("", "sglang", "python/sglang")
"""Where SGLang's package is below a path that an operator gives: itself, site-packages, the repository."""


def package_in(path: Path) -> Path:
    """Return the folder of SGLang's package in or below ``path``. Raises ValueError."""
    for place in _PLACES:
        if (path / place / "srt" / "server_args.py").is_file():
            return path / place
    raise ValueError(f"{path} is no source tree of SGLang: neither it nor sglang/ in it has srt/server_args.py")


def version_of(tree: Path) -> str | None:
    """Return the version in a tree's ``_version.py``, or None: repositories get theirs when they are built."""
    file = tree / "_version.py"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(r"""^__version__ = .*?["']([^"']+)["']""", text, re.MULTILINE)
    return found[1] if found else None


def drift_of(tree: Path) -> list[Drift]:
    """Return how the hooked symbols of a tree differ from the release's. Raises SyntaxError and OSError."""
    return source_drift(read_manifest(), tree)


def lost_imports(tree: Path) -> list[str]:
    """Return the modules and names of SGLang that this package imports and the tree does not have."""
    return sorted(".".join(filter(None, name)) for name in package_imports() if not _has(tree, *name))


def without_seam(tree: Path) -> list[str]:
    """Return the hooked symbols that have no seam, if the tree has no plugin system by which they could be hooked."""
    if (tree / "srt" / "plugins" / "hook_registry.py").is_file():
        return []
    missing = []
    for entry in read_manifest().entries:
        with contextlib.suppress(MissingSymbolError):  # reported as drift
            if not has_seam(entry.symbol, tree):
                missing.append(entry.symbol)
    return missing


def _has(tree: Path, module: str, name: str) -> bool:
    place = tree.joinpath(*module.split(".")[1:])
    if name and (_is_module(place / name)):
        return True
    if not name or not _is_module(place):
        return _is_module(place)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    names = bound_names(file) if file.is_file() else frozenset()
    return names is None or name in names


def _is_module(place: Path) -> bool:
    """Return whether a path without its suffix is a module or a package, also one without __init__.py."""
    return place.with_suffix(".py").is_file() or place.is_dir()
