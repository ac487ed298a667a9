"""Fingerprints of installed source code, read from its file without importing or running it.

A hook is written against the source of the symbol it changes. The manifest has the fingerprint of that source, so that
a release or fork that differs there is noticed before the server starts. Comments, docstrings, blank lines and
formatting do not count.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path


class MissingSymbolError(LookupError):
    """The installed source has no symbol of this dotted path. The text says where the path ends."""


def fingerprint(target: str) -> str:
    """Return the first 16 hex digits of a sha256 over the source of ``target`` (``package.module.Class.method``).

    If the symbol is defined more than once (in the branches of an ``if``), all definitions count. ``target`` must be
    the place of the definition: :class:`MissingSymbolError` is raised for an inherited method and for a name that a
    module only imports.
    """
    path, names = _locate(target)
    scopes: list[ast.AST] = [_parse(path, path.stat().st_mtime_ns)]
    for depth, name in enumerate(names):
        scopes = [found for scope in scopes for found in _definitions(scope, name)]
        if not scopes:
            where = f"class {names[depth - 1]}" if depth else "the module"
            raise MissingSymbolError(f"{name} is not defined in {where} ({path})")
    source = "\n".join(_canonical(scope) for scope in scopes)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def source_file(target: str) -> Path:
    """Return the file that :func:`fingerprint` reads. Raises :class:`MissingSymbolError`."""
    return _locate(target)[0]


def _locate(target: str) -> tuple[Path, list[str]]:
    """Find, without importing, the file that defines ``target``, and the names below its module."""
    top, *rest = target.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise MissingSymbolError(f"{top} is not installed")
    if not spec.submodule_search_locations:
        return Path(spec.origin or ""), rest
    here = Path(next(iter(spec.submodule_search_locations)))
    while rest:
        package, module = here / rest[0], here / f"{rest[0]}.py"
        if module.is_file() and not (package / "__init__.py").is_file():
            return module, rest[1:]
        if not package.is_dir():
            break
        here, rest = package, rest[1:]
    if not rest or not (here / "__init__.py").is_file():
        raise MissingSymbolError(f"there is no module for {target} under {here}")
    return here / "__init__.py", rest


@lru_cache(maxsize=64)
def _parse(path: Path, mtime_ns: int) -> ast.Module:
    # Many hooks share a file, and scheduler.py alone takes 0.13 s.
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _definitions(scope: ast.AST, name: str) -> Iterator[ast.AST]:
    """Yield the statements of a module or class body that bind ``name``, also inside if, try and with."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name == name:
                yield node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                yield node
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _definitions(node, name)


def _canonical(node: object) -> str:
    """Write a tree like ``ast.dump``, but without empty fields, which differ between releases of Python.

    All machines share one manifest, whichever Python they have.
    """
    if isinstance(node, ast.Constant):
        return f"={node.value!r}"
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [type(node).__name__]
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            value = _without_docstring(node)
        elif isinstance(node, ast.JoinedStr):  # Python 3.12.1 adds empty strings to format specs
            value = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
        if value is not None and value != [] and field not in ("ctx", "type_comment"):
            parts.append(f"{field}:{_canonical(value)}")
    return "(" + " ".join(parts) + ")"


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[ast.stmt]:
    return node.body if ast.get_docstring(node, clean=False) is None else node.body[1:]
