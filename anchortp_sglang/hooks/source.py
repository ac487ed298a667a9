"""Source code of SGLang, read from its files without importing or running it.

A hook is written against the source of the symbol it changes. The manifest has the fingerprint of that source, so that
a release or fork that differs there is noticed before the server starts. Comments, docstrings, blank lines and
formatting do not count. ``tree`` is a folder of the package ``sglang``, or None for the installed one.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SEAM = "anchortp_seam"
"""The decorator that :mod:`anchortp_sglang.hooks.seams` puts on hooked functions of a fork. Fingerprints ignore it."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class MissingSymbolError(LookupError):
    """The source has no symbol of this dotted path. The text says where the path ends."""


@dataclass(frozen=True)
class Symbol:
    """A symbol's source, as the manifest keeps it. ``parameters``: "(self, x)" or "async (self, x)", without types."""

    fingerprint: str
    parameters: str


def read_symbol(target: str, tree: Path | None = None) -> Symbol:
    """Return fingerprint and parameters of ``target`` (``package.module.Class.method``).

    If the symbol is defined more than once (in the branches of an ``if``), all definitions count. ``target`` must be
    the place of the definition: :class:`MissingSymbolError` is raised for an inherited method and for a name that a
    module only imports.
    """
    found = definitions(target, tree)
    parameters = [_parameters(node) for node in found if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    digest = hashlib.sha256("\n".join(_canonical(node) for node in found).encode()).hexdigest()
    return Symbol(digest[:16], " or ".join(dict.fromkeys(parameters)))


def fingerprint(target: str, tree: Path | None = None) -> str:
    """Return the first 16 hex digits of a sha256 over the source of ``target``. Raises :class:`MissingSymbolError`."""
    return read_symbol(target, tree).fingerprint


def definitions(target: str, tree: Path | None = None) -> list[Definition]:
    """Return the statements that define ``target``, at least one. Raises :class:`MissingSymbolError`."""
    path, names = _locate(target, tree)
    scopes: list[ast.AST] = [parse(path)]
    for depth, name in enumerate(names):
        scopes = [found for scope in scopes for found in _definitions(scope, name)]
        if not scopes:
            where = f"class {names[depth - 1]}" if depth else "the module"
            raise MissingSymbolError(f"{name} is not defined in {where} ({path})")
    return [scope for scope in scopes if isinstance(scope, Definition)]


def source_file(target: str, tree: Path | None = None) -> Path:
    """Return the file that defines ``target``. Raises :class:`MissingSymbolError`."""
    return _locate(target, tree)[0]


def package_folder(name: str) -> Path:
    """Return the folder of an installed top-level package. Raises :class:`MissingSymbolError`."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingSymbolError(f"{name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def _locate(target: str, tree: Path | None) -> tuple[Path, list[str]]:
    """Find, without importing, the file that defines ``target``, and the names below its module."""
    top, *rest = target.split(".")
    here = package_folder(top) if tree is None else tree
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


def has_seam(target: str, tree: Path | None = None) -> bool:
    """Return whether every definition of ``target`` has the decorator :data:`SEAM`. Raises MissingSymbolError."""
    return all(any(map(_is_seam, getattr(node, "decorator_list", ()))) for node in definitions(target, tree))


def _is_seam(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id == SEAM


def parse(file: Path) -> ast.Module:
    """Return a file's syntax tree. Raises SyntaxError (also for bytes that are no text) and OSError."""
    return _parse(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _parse(path: Path, mtime_ns: int) -> ast.Module:
    # Many hooks share a file, and scheduler.py alone takes 0.13 s.
    return ast.parse(path.read_bytes(), filename=str(path))  # bytes: a coding line or a BOM counts, as in an import


def _definitions(scope: ast.AST, name: str) -> Iterator[ast.AST]:
    """Yield the statements of a module or class body that bind ``name``, also inside if, try and with."""
    for node in statements(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name == name:
                yield node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                yield node


def statements(scope: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements that run with a module or class body, also inside if, try, with and loops."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler, ast.For, ast.While)):
            yield from statements(node)
        elif isinstance(node, ast.stmt):
            yield node


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = copy.deepcopy(function.args)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"{'async ' if isinstance(function, ast.AsyncFunctionDef) else ''}({ast.unparse(arguments)})"


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
        elif field == "decorator_list":
            value = [decorator for decorator in value if not _is_seam(decorator)]
        if value is not None and value != [] and field not in ("ctx", "type_comment"):
            parts.append(f"{field}:{_canonical(value)}")
    return "(" + " ".join(parts) + ")"


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[ast.stmt]:
    return node.body if ast.get_docstring(node, clean=False) is None else node.body[1:]
