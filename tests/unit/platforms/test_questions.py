"""Nothing outside ``platforms/`` asks which platform it runs on: what differs is a question of the interface."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "anchortp_sglang"

TELLS = re.compile(r"cpu|cuda|gpus?|is_cuda|is_cpu")
"""Names and strings that tell one platform from another."""

IMPLEMENTATIONS = ("anchortp_sglang.platforms.cpu", "anchortp_sglang.platforms.cuda")

MAY_ASK = {
    "startup/device.py": "chooses the platform",
    "startup/fork_guard.py": "must know of a driver in this process, on whatever platform",
    "memory/cuda_ipc.py": "is a GPU's arena, which anchors import without torch",
    "memory/cuda_vmm.py": "the same",
    "hooks/table.py": "names the hook functions of both platforms",
    "hooks/__main__.py": "writes the manifest, on a machine without a GPU",
    "fleet/config.py": "says what Ray reserves for a server, where no server runs",
    "cli/doctor.py": "says what the machine has, before any platform is chosen",
    "planning/prediction/presets.py": "knows a machine by this name",
    "bench/sides.py": "starts stock SGLang, which has no platform of ours",
    "testing/stock_server.py": "the same",
}
"""File -> why. All others ask ``Platform``."""


def questions(source: str) -> Iterator[str]:
    """Yield names of the code that tell platforms apart, such strings in comparisons and tables, and imports of
    implementations; not prose, flags that are passed on, or ``tensor.cpu()``."""
    tree = ast.parse(source)
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (node.attr == "cpu" and id(node) in calls):
            yield from filter(TELLS.fullmatch, [node.attr])
        elif isinstance(node, ast.Name):
            yield from filter(TELLS.fullmatch, [node.id])
        elif isinstance(node, ast.arg):
            yield from filter(TELLS.fullmatch, [node.arg])
        elif isinstance(node, (ast.Compare, ast.Dict, ast.MatchValue)):
            inside = node.keys if isinstance(node, ast.Dict) else [node]
            values = [each.value for key in inside if key for each in ast.walk(key) if isinstance(each, ast.Constant)]
            yield from (value for value in values if isinstance(value, str) and TELLS.fullmatch(value))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(IMPLEMENTATIONS))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name.startswith(IMPLEMENTATIONS))


def test_nobody_outside_asks_which_platform_it_is() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("platforms/") and (asked := sorted(set(questions(path.read_text())))):
            found[name] = asked
    assert {name: asked for name, asked in found.items() if name not in MAY_ASK} == {}
    assert sorted(found) == sorted(MAY_ASK), "a reason that is needed no more"


@pytest.mark.parametrize(
    "line",
    [
        "if tensor.is_cuda: pass",
        "if at.gpu is None: pass",
        "def start(gpus): pass",
        'if device == "cuda": pass',
        'if device in ("cpu", "xpu"): pass',
        'KERNELS = {"cuda": 1}[device]',
        "torch.cuda.synchronize()",
        "from anchortp_sglang.platforms.cuda import probe",
        "from anchortp_sglang.platforms import cuda",
    ],
)
def test_a_question_is_noticed(line: str) -> None:
    assert list(questions(line))


@pytest.mark.parametrize(
    "line", ["slots.cpu().numpy()", "gpu_id = 3", '"""Of a gpu."""', 'run("--device", "cpu")', "platform.moves_kv"]
)
def test_what_is_no_question_is_let_be(line: str) -> None:
    assert not list(questions(line))
