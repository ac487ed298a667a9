"""The tables in docs/models.md are those of the kept results, and the results are complete and equal."""

import json

import compare_models
import models_table
import pytest
from places import ROOT
from table_page import published

from anchortp_sglang.planning.model.families import FAMILIES


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "docs" / "models.json").read_text())


def test_the_documented_table_is_up_to_date(results):
    documented = published("models_table.py", ROOT / "docs" / "models.md")
    assert documented == "\n".join(models_table.tables(results)), "run tools/models_table.py docs/models.md"


def test_every_served_family_was_compared_at_every_size_and_with_experts_both_ways(results):
    assert set(results) == {compared.name for compared in compare_models.comparisons()}, "run tools/compare_models.py"
    assert set(compare_models.served().values()) == {
        name for name, family in FAMILIES.items() if not (family.layout_only or family.without_stock)
    }


def test_all_answers_were_equal_and_logprobs_near_before_and_after_a_loss(results):
    for name, result in results.items():
        assert result["equal"], name
        assert set(result["rounds"]) == {"before loss", "after loss"}
        for one in result["rounds"].values():
            assert (one["answers"], one["answers_equal"], one["tokens"]) == (5, 5, 5 * 64), name
            assert one["max_delta_logprob"] <= 1e-4
            assert one["unpaired_logprobs"] == 0


def test_a_result_that_differs_is_not_called_served(results):
    name = next(name for name, one in results.items() if one["architecture"] == "Qwen3ForCausalLM")
    changed = results | {name: results[name] | {"equal": False}}
    (row,) = (line for line in models_table.tables(changed) if "`Qwen3ForCausalLM`" in line)
    assert "| DIFFERS |" in row
