"""A server whose command line is like those in launch files."""

import launch_file
import pytest


@pytest.mark.overlap
def test_it_serves_under_the_repositorys_name_as_it_was_told(server):
    (model,) = server.get("/v1/models")["data"]
    assert (model["id"], model["max_model_len"]) == (launch_file.REPOSITORY, launch_file.CONTEXT_LENGTH)
    flags = server.get("/server_info")
    assert flags["served_model_name"] == launch_file.REPOSITORY
    assert flags["mem_fraction_static"] == launch_file.MEM_FRACTION
    assert flags["chunked_prefill_size"] == launch_file.CHUNK
    assert flags["disable_overlap_schedule"] is False
