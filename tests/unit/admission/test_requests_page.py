"""docs/requests.md knows every request field, sampling parameter and route of SGLang, and says what the checks say."""

import ast
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchortp_sglang.admission.checks import check_generate_request
from anchortp_sglang.admission.requests import REQUEST_FIELDS, SAMPLING_KEYS, SERVED_ROUTES

ROOT = Path(__file__).parents[3]
SRT = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "srt"
PAGE = (ROOT / "docs" / "requests.md").read_text()
SET_BY_SGLANG = {
    *("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len"),
    *("is_normalized", "ebnf_full_assistant"),
}
"""Fields of SamplingParams that no client sends: /generate's contract refuses them."""


def rows(heading):
    """The rows of the table under a heading: names in the first cell, what the page says, the last cell."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")
    ]
    return [(re.findall("`([^`]+)`", first), across, test) for first, across, _, test in cells]


def named(heading):
    names = [name for found, _, _ in rows(heading) for name in found]
    assert len(names) == len(set(names)), "a name stands twice"
    return set(names)


def refused(heading):
    return {name for found, says, _ in rows(heading) if says.startswith("refused") for name in found}


def fields_of(file, class_name):
    tree = ast.parse((SRT / file).read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return {each.target.id for each in found.body if isinstance(each, ast.AnnAssign)}


def test_every_field_of_a_request_is_on_the_page():
    """A field that a new SGLang adds is not, and somebody has to decide."""
    assert named("Fields") == fields_of("managers/io_struct.py", "GenerateReqInput")


def test_every_sampling_parameter_is_on_the_page():
    assert named("Sampling parameters") == fields_of("sampling/sampling_params.py", "SamplingParams") - SET_BY_SGLANG


def test_every_served_route_is_on_the_page():
    assert named("Routes") == SERVED_ROUTES


def test_what_the_page_calls_refused_is_refused():
    assert refused("Fields") == set(REQUEST_FIELDS)
    assert refused("Sampling parameters") == set(SAMPLING_KEYS)


@pytest.mark.parametrize("name", sorted(named("Fields") - set(REQUEST_FIELDS)))
def test_what_the_page_calls_served_is_not_refused(name):
    value = {"sampling_params": {}, "custom_logit_processor": '{"callable": "80"}', "return_hidden_states": "last"}
    assert check_generate_request(SimpleNamespace(**{name: value.get(name, "something")})) is None


def test_every_test_that_the_page_names_exists():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    functions = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    on_page = set(re.findall(r"`(test_\w+)`", PAGE))
    assert on_page and on_page <= functions, on_page - functions
    files = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert files and [path for path in files if not (ROOT / path).exists()] == []
    for heading in ("Fields", "Sampling parameters", "Routes"):
        for names, _, test in rows(heading):
            assert re.search(r"test_|kills, loss|the same|none|#structured-output", test), names
