"""SGLang's own server tests (``sglang.test.kits``) as unittest cases against a server that is already there."""

import importlib
import random
import unittest
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
from faults import is_gone
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from sglang.test import kl_test_utils
from sglang.test.server_fixtures.spec_eagle_fixture import SpecEagleServerBase

from anchortp_sglang.testing.server import Server

_PACKAGE = "sglang.test.kits"

# Sizes for two CPU cores. What a kit asks for stays; how much of it is less.
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "AbortAllMixin": {"abort_all_num_requests": 8, "abort_all_sleep": 1},
    "KLDivergenceMixin": {
        "kl_div_thres": 0.003,
        "kl_div_max_samples": 4,
        "kl_div_prefill_max_new_tokens": 32,
        "kl_div_decode_max_new_tokens": 32,
    },
    "RunningTimeoutTwoWaveMixin": {"running_timeout_sleep": 1, "running_timeout_max_new_tokens": 256},
    "UnifiedRadixTreeTestMixin": {"max_new_tokens": 32, "prefix_len": 256},
    "ReasoningTokenUsageMixin": {"reasoning_parser_name": "qwen3"},
}


class _Process:
    """What kits ask of a server's process: whether it has ended."""

    def __init__(self, server: Server) -> None:
        self.pid = server.pid

    def poll(self) -> int | None:
        return 1 if is_gone(self.pid) else None


class Host(unittest.TestCase):
    """The attributes that kits expect of the class that they are mixed into."""

    server: Server
    model: str
    base_url: str
    api_key = "none"
    input_ids = [random.Random(seed).choices(range(30000), k=512) for seed in range(kl_test_utils.DEFAULT_NUM_SAMPLES)]

    @classmethod
    def setUpClass(cls) -> None:
        # get_input_ids downloads its prompts, unless it has them already.
        key = f"{cls.model}_{kl_test_utils.DEFAULT_PROMPT_TOKENS}_{kl_test_utils.DEFAULT_NUM_SAMPLES}"
        kl_test_utils._cached_input_ids[key] = [prompt[:200] for prompt in cls.input_ids]

    # What SGLang's fixture has for kits that need it.
    run_decode = SpecEagleServerBase.run_decode
    send_request = SpecEagleServerBase.send_request
    send_requests_abort = SpecEagleServerBase.send_requests_abort

    @cached_property
    def process(self) -> _Process:
        return _Process(self.server)

    @cached_property
    def tokenizer(self) -> Any:
        return get_tokenizer(self.model)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=self.api_key, max_retries=0)


def run(test: str, server: Server, model: Path) -> None:
    """Run one test of ``sglang_tests.kit_tests()``; raises what it raises."""
    module, name, method = test.split(".")
    mixin = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
    given = {"server": server, "base_url": server.url, "model": str(model)} | _ATTRIBUTES.get(name, {})
    case = type(name, (mixin, Host), given)
    case.setUpClass()
    try:
        case(method).debug()  # without a result: the exception comes out, also that of a subtest
    finally:
        case.tearDownClass()
