"""SGLang's own serving benchmark (``sglang.bench_serving``) as a load of ``anchortp bench overhead``."""

import contextlib
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchortp_sglang.bench.overhead import Figures
from anchortp_sglang.testing.server import Server, ServerFailed

PROMPT_TOKENS = 64
NEW_TOKENS = 96
_SECONDS = 8.0  # of a round with a request rate


@dataclass(frozen=True)
class ServingLoad:
    """Requests that arrive at random, ``rate_per_s`` a second, or (``batch``) so many of them at any time."""

    rate_per_s: float = math.inf
    batch: int | None = None

    def __post_init__(self) -> None:
        if (
            not self.rate_per_s > 0
            or (self.batch is None and math.isinf(self.rate_per_s))
            or (self.batch is not None and self.batch < 1)
        ):
            raise ValueError(f"a load needs a rate above 0 or a batch of at least 1, got {self}")

    def __str__(self) -> str:
        return f"{self.rate_per_s:g} requests/s" if self.batch is None else f"batch {self.batch}"

    @property
    def prompts(self) -> int:
        """Return the number of requests in a round: some seconds of arrivals, or three batches."""
        return max(8, round(_SECONDS * self.rate_per_s) if self.batch is None else 3 * self.batch)

    def measure(self, server: Server, model: Path) -> Figures:
        """Run the benchmark once. ``model``: the folder of its tokenizer. Raises ServerFailed if a request failed."""
        from sglang.benchmark.serving import run_benchmark  # here: its import takes seconds
        from sglang.test.test_utils import get_benchmark_args

        arguments = get_benchmark_args(
            base_url=server.url,
            dataset_name="random-ids",  # needs no download
            tokenizer=str(model),
            num_prompts=self.prompts,
            random_input_len=PROMPT_TOKENS,
            random_output_len=NEW_TOKENS,
            request_rate=self.rate_per_s,
            max_concurrency=self.batch,
            device="cpu",
        )
        arguments.random_range_ratio = 1.0  # all of these lengths
        arguments.disable_tqdm = True
        arguments.output_file = os.devnull  # else in the current folder
        arguments.tokenize_prompt = True  # ids as they are: as text they would be tokenized to other lengths
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                found = run_benchmark(arguments)
        except (Exception, SystemExit) as error:
            raise ServerFailed(f"sglang.bench_serving failed: {error}\n{said.getvalue()[-2000:]}") from error
        return _figures(found, self.prompts)


def _figures(found: dict[str, Any], prompts: int) -> Figures:
    """Return a result's figures. Raises ServerFailed unless every request got all of its tokens.

    SGLang's client counts a stream that ends early, or with an error, as completed; with all tokens if none came.
    """
    lengths = zip(found["ttfts"], found["output_lens"], strict=True)
    whole = [ttft > 0 and length == NEW_TOKENS for ttft, length in lengths]
    if len(whole) != prompts or not all(whole):
        errors = [error for error in found["errors"] if error]
        raise ServerFailed(
            f"{prompts - sum(whole)} of {prompts} requests did not get all of their tokens: {errors[:1]}"
        )
    return Figures(
        throughput=found["output_throughput"],
        ttft_s=found["median_ttft_ms"] / 1000,
        itl_s=found["median_itl_ms"] / 1000,
        itl_p99_s=found["p99_itl_ms"] / 1000,
    )
