"""The table in docs/planner.md is what the planner says today."""

import planner_table
from places import ROOT
from table_page import published


def test_the_documented_table_is_up_to_date():
    documented = published("planner_table.py", ROOT / "docs" / "planner.md")
    assert documented == "\n".join(planner_table.table()), "run tools/planner_table.py docs/planner.md"


def test_in_every_case_adopt_moves_nothing_and_both_families_reload_the_lower_bound():
    for config in planner_table.MODELS.values():
        for case in planner_table.CASES:
            for strategy in ("adopt", "contiguous"):
                plan = planner_table.answer(config, case, strategy).plan
                assert plan.reload_bytes == plan.reload_lower_bound_bytes
                assert (plan.p2p_bytes == 0) == (strategy == "adopt")
