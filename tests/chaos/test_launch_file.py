"""A server whose command line is like those in launch files: a repository's name, abbreviations, overrides."""

import pytest
from conftest import CONTEXT_LENGTH, REPOSITORY


@pytest.mark.overlap
def test_it_serves_under_the_repositorys_name_with_the_overridden_length(server):
    (model,) = server.get("/v1/models")["data"]
    assert (model["id"], model["max_model_len"]) == (REPOSITORY, CONTEXT_LENGTH)
    told = server.get("/server_info")
    assert told["served_model_name"] == REPOSITORY
    assert told["disable_overlap_schedule"] is False
    assert told["mem_fraction_static"] == 0.9 and told["chunked_prefill_size"] == 128
