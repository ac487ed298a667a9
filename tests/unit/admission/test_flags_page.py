"""docs/flags.md says of each flag what the checks say."""

import shlex
from pathlib import Path

import pytest

from anchortp_sglang.admission.checks import check_server_args
from anchortp_sglang.hooks.flags import given_flags
from anchortp_sglang.platforms.cpu.platform import CpuPlatform
from anchortp_sglang.startup.preflight import flag_values

PAGE = Path(__file__).parents[3] / "docs" / "flags.md"
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if "| `--" in line]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_flag_is_served_or_refused_as_the_page_says(row):
    flag, default, here = row
    given = flag_values(given_flags(shlex.split(flag.strip("`"))))
    assert given and default
    on_gpus = here.startswith("served on GPUs")
    refused = bool(check_server_args(given | {"device": "cpu"}, CpuPlatform.rules, {}))
    assert refused == (here.startswith("refused") or on_gpus), here
    assert here.startswith(("served", "refused"))
