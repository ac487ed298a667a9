"""SGLang's serving benchmark (``sglang.bench_serving``) against a server that is there, with prompts of random ids."""

import os
from pathlib import Path
from typing import Any

from anchortp_sglang.testing.server import Server

BACKENDS = ("sglang", "sglang-oai-chat")
PROMPTS = 24


def run(server: Server, model: Path, backend: str) -> dict[str, Any]:
    """Its result. ``random-ids`` is the data set that needs no download."""
    from sglang.benchmark.serving import run_benchmark  # here: it takes seconds, not while tests are collected
    from sglang.test.test_utils import get_benchmark_args

    args = get_benchmark_args(
        base_url=server.url,
        backend=backend,
        dataset_name="random-ids",
        tokenizer=str(model),
        num_prompts=PROMPTS,
        random_input_len=64,
        random_output_len=48,
        request_rate=8,
        device="cpu",
    )
    args.output_file = os.devnull  # else in the current folder
    return run_benchmark(args)


def assert_complete(result: dict[str, Any]) -> None:
    assert result["completed"] == PROMPTS
    assert result["total_output_tokens"] > PROMPTS
