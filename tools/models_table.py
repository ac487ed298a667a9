#!/usr/bin/env python3
"""Print the tables of docs/models.md, or with a file's name put them between the marks in that file.

PYTHONPATH=. python tools/models_table.py [docs/models.md]

What was compared comes from docs/models.json (tools/compare_models.py), everything else from the families themselves.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from table_page import publish

from anchortp_sglang.planning.model.families import FAMILIES

RESULTS = Path(__file__).parent.parent / "docs" / "models.json"
HEADINGS = (
    "architecture",
    "status",
    "experts",
    "devices compared",
    "answers equal",
    "max \\|Δlogprob\\|",
    "after a loss",
    "date",
)


def tables(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table and of the notes below it, in Markdown."""
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|---|---|---|---|---:|---:|---:|---|"
    for architecture, family in FAMILIES.items():
        mine = [one for one in results.values() if one["architecture"] == architecture]
        splits = ("tp", "ep") if family.experts else ("",)
        for split in splits:
            rows = [one for one in mine if not split or one["experts"] == split]
            status = "layout only" if family.layout_only else "served" if family.without_stock else _status(rows)
            yield "| " + " | ".join([f"`{architecture}`", status, split or "-", *_cells(rows)]) + " |"
    notes = list(_notes())
    if notes:
        yield ""
        yield from notes


def _status(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "not compared"
    return "served" if all(one["equal"] for one in results) else "DIFFERS"


def _cells(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return ["-"] * 5
    rounds = [each for one in results for each in one["rounds"].values()]
    equal, asked = (sum(each[key] for each in rounds) for key in ("answers_equal", "answers"))
    return [
        ", ".join(str(number) for number in sorted(one["devices"] for one in results)),
        f"{equal} of {asked}",
        *(f"{max(one['rounds'][when]['max_delta_logprob'] for one in results):.1e}" for when in _ROUNDS),
        max(one["date"] for one in results),
    ]


_ROUNDS = ("before loss", "after loss")


def _notes() -> Iterator[str]:
    for architecture, family in FAMILIES.items():
        if family.layout_only:
            yield _item(f"`{architecture}` is refused at start: {family.layout_only}.")
        if family.without_stock:
            yield _item(
                f"`{architecture}` is compared with transformers (`tests/engine/test_parity.py`), as "
                f"{family.without_stock}."
            )
        for _, caveat in family.caveats:
            yield _item(f"`{architecture}`: {caveat}. The server logs it at start.")


def _item(text: str) -> str:
    return textwrap.fill(text, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


if __name__ == "__main__":
    publish("models_table.py", tables(json.loads(RESULTS.read_text())))
