"""Names in source code: what a file of SGLang defines, and what a hook relies on. Nothing is imported or run."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

from anchortp_sglang.hooks.source import parse, statements

_OF_PYTHON = frozenset(name for kind in (type, str, bytes, list, dict, set) for name in dir(kind))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def defined_names(file: Path) -> frozenset[str]:
    """Return the functions, classes, fields and attributes (``self.x = ...``) that a file defines."""
    return _defined_names(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _defined_names(file: Path, mtime_ns: int) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, (ast.Module, ast.ClassDef)):
            own = (each for each in statements(node) if not isinstance(each, (ast.Import, ast.ImportFrom)))
            names |= {name for statement in own for name in _bound(statement)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return frozenset(names)


def used_names(file: Path, function: str) -> frozenset[str]:
    """Return the attributes that a function of ``file`` uses, and those that the file's functions it refers to use.

    Those of Python's own types are left out. ``function``: its dotted path below the module; for a method the whole
    class counts.
    """
    nodes = {node.name: node for node in parse(file).body if isinstance(node, (*_FUNCTIONS, ast.ClassDef))}
    names: set[str] = set()
    waiting, seen = [function.partition(".")[0]], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in nodes:
            continue
        seen.add(name)
        for node in ast.walk(nodes[name]):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Name):
                waiting.append(node.id)
    return frozenset(names - _OF_PYTHON)


@lru_cache(maxsize=1)
def package_names() -> frozenset[str]:
    """Return the attributes that this package uses of other objects: those that none of its own files defines."""
    files = _package_files()
    used = {node.attr for file in files for node in ast.walk(parse(file)) if isinstance(node, ast.Attribute)}
    return frozenset(used - _OF_PYTHON).difference(*map(_own_names, files))


@lru_cache(maxsize=1)
def package_imports() -> frozenset[tuple[str, str]]:
    """Return module and name of every import from SGLang in this package, "" for the name of a plain import."""
    found: set[tuple[str, str]] = set()
    for node in (node for file in _package_files() for node in ast.walk(parse(file))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {(node.module, alias.name) for alias in node.names}
    return frozenset(each for each in found if each[0].partition(".")[0] == "sglang")


def _package_files() -> list[Path]:
    return sorted(Path(__file__).resolve().parents[1].rglob("*.py"))


def _own_names(file: Path) -> frozenset[str]:
    """Return what a file of ours defines, without attributes that it sets on other objects (``req.x = …``)."""
    on_others = {
        node.attr
        for node in ast.walk(parse(file))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    return defined_names(file) - on_others


def bound_names(file: Path) -> frozenset[str] | None:
    """Return the names that a module has after its import. None if a ``*`` import or ``__getattr__`` hides them."""
    names = {name for statement in statements(parse(file)) for name in _bound(statement)}
    return None if names & {"*", "__getattr__"} else frozenset(names)


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement binds in its own scope, "*" for a ``*`` import."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
