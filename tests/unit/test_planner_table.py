"""The table in docs/planner.md is what the planner says today."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("planner_table", ROOT / "tools" / "planner_table.py")


@pytest.fixture(scope="module")
def planner_table():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return module


def test_the_documented_table_is_up_to_date(planner_table):
    page = (ROOT / "docs" / "planner.md").read_text()
    documented = page.partition(planner_table.BEGIN)[2].partition(planner_table.END)[0].strip()
    assert documented == "\n".join(planner_table.table()), "run tools/planner_table.py docs/planner.md"


def test_in_every_case_adopt_moves_nothing_and_both_families_reload_the_lower_bound(planner_table):
    for config in planner_table.MODELS.values():
        for case in planner_table.CASES:
            for family in ("adopt", "contiguous"):
                plan = planner_table.answer(config, case, family).plan
                assert plan.reload_bytes == plan.reload_lower_bound_bytes
                assert (plan.p2p_bytes == 0) == (family == "adopt")
