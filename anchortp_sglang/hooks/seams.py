"""The patch that gives a fork of SGLang without a plugin system a seam at each function that is hooked.

A seam is the decorator of :mod:`anchortp_sglang.hooks.anchortp_seam`. :func:`anchortp_sglang.hooks.install.install`
fills seams where it finds them, and uses SGLang's plugin system elsewhere. ``python -m anchortp_sglang.hooks --write``
writes the patch.
"""

from __future__ import annotations

import ast
import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from anchortp_sglang.hooks import anchortp_seam
from anchortp_sglang.hooks.source import SEAM, definitions, package_folder, parse, source_file

_REPOSITORY = "python/sglang"
"""SGLang's package in its repository, from whose root the patch applies (``git apply``)."""

_MODULE = "srt/anchortp_seam.py"


def is_patched() -> bool:
    """Return whether the installed SGLang has seams."""
    return (package_folder("sglang") / _MODULE).is_file()


def patch_text(targets: Iterable[str]) -> str:
    """Return a unified diff that puts seams on ``targets``, functions of the installed SGLang, which has none.

    Raises MissingSymbolError, and ValueError for a target that is no function.
    """
    targets_of: dict[Path, list[str]] = defaultdict(list)
    for target in dict.fromkeys(targets):
        targets_of[source_file(target)].append(target)
    text = _diff(_MODULE, [], Path(anchortp_seam.__file__).read_text(encoding="utf-8").splitlines(keepends=True))
    for file, its_targets in sorted(targets_of.items()):
        before = file.read_bytes().decode(encoding="utf-8").splitlines(keepends=True)
        insertions = [_import(file), *(place for target in its_targets for place in _seams(target))]
        after = list(before)
        for line, inserted in sorted(insertions, reverse=True):
            after.insert(line - 1, inserted)
        text += _diff(file.relative_to(package_folder("sglang")).as_posix(), before, after)
    return text


def _import(file: Path) -> tuple[int, str]:
    """Return the line of a module's first import of SGLang, or of anything, and ours to go before it."""
    imports = [node for node in parse(file).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    others = [node for node in imports if getattr(node, "module", None) != "__future__"]
    of_sglang = [node for node in others if str(getattr(node, "module", None)).startswith("sglang")]
    first = (of_sglang or others)[0]
    return first.lineno, f"from sglang.{_MODULE.removesuffix('.py').replace('/', '.')} import {SEAM}\n"


def _seams(target: str) -> Iterator[tuple[int, str]]:
    """Yield, for each definition of a function, its line, and the decorator to go before it.

    The seam goes inside ``@staticmethod`` and ``@classmethod``, and around other decorators.
    """
    for node in definitions(target):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            raise ValueError(f"{target} is not a function: a seam cannot be put there")
        lines = [place.lineno for place in node.decorator_list if not _is_method_kind(place)]
        yield min([*lines, node.lineno]), f"{' ' * node.col_offset}@{SEAM}\n"


def _is_method_kind(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name) and decorator.id in ("staticmethod", "classmethod")


def _diff(name: str, before: list[str], after: list[str]) -> str:
    path = f"{_REPOSITORY}/{name}"
    return "".join(difflib.unified_diff(before, after, f"a/{path}" if before else "/dev/null", f"b/{path}"))
