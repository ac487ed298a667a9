"""Names in source code: what a file of SGLang defines, and what a hook relies on. Nothing is imported or run."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

from anchortp_sglang.hooks.source import parse, statements

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
            names |= {name for statement in statements(node) for name in _bound(statement)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return frozenset(names)


def used_names(file: Path, function: str) -> frozenset[str]:
    """Return the attributes that a function of ``file`` uses, and those that the file's functions it refers to use.

    ``function``: its dotted path below the module; for a method the whole class counts.
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
    return frozenset(names)


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
