"""Tests for a server with and without faults; test_plain.py and test_under_kills.py import them."""

import bench_run
import kit_list
import programs
import pytest
import sglang_tests


@pytest.mark.parametrize("test", kit_list.chosen(sglang_tests.kit_tests()))
def test_kit(server, model, test):
    import kit_cases  # here: with SGLang it takes seconds, not while tests are collected

    kit_cases.run(test, server, model)


@pytest.mark.parametrize("name", programs.RUN)
def test_program(server, name):
    programs.run(name, server)


@pytest.mark.parametrize("backend", bench_run.BACKENDS)
def test_every_request_of_the_benchmark_succeeds(server, model, backend):
    bench_run.assert_complete(bench_run.run(server, model, backend))
