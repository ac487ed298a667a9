"""The names of tests that SGLang ships, read from their source: importing it takes seconds, and some of it imports
what is not installed."""

import ast
import importlib.util
from pathlib import Path

_SPEC = importlib.util.find_spec("sglang")
assert _SPEC is not None and _SPEC.submodule_search_locations
_TESTS = Path(_SPEC.submodule_search_locations[0]) / "test"


def kit_tests() -> list[str]:
    """Every test of every kit in ``sglang.test.kits``, as module.Class.test_name."""
    return [
        f"{path.stem}.{node.name}.{test}"
        for path in sorted((_TESTS / "kits").glob("*_kit*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
        for test in _tests(node.body)
    ]


def programs() -> list[str]:
    """The programs of ``sglang.test.test_programs``."""
    return _tests(ast.parse((_TESTS / "test_programs.py").read_text()).body)


def _tests(body: list[ast.stmt]) -> list[str]:
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
