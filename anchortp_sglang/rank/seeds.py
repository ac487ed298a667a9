"""Makes a seeded draw depend on its own request only, so that a resumed request draws what it would have drawn.

With --enable-deterministic-inference a token is drawn from the logits, the request's sampling_seed and the position
(``multinomial_with_seed``, layers/sampler.py). But as soon as one request of a batch has a top_k or top_p, SGLang sorts
the probabilities of all, and the noise of a token is that of its rank instead of its id. So a request without these
draws other tokens than alone, and after a fault it has other neighbours.
"""

from collections.abc import Callable
from typing import Any


def around_sample_from_probs(
    original: Callable[..., Any], sampler: Any, probs: Any, info: Any, positions: Any, simple: bool
) -> Any:
    """AROUND Sampler._sample_from_probs: rows without top_k and top_p draw as in a batch without any."""
    tokens, captured = original(sampler, probs, info, positions, simple)
    if simple or info.sampling_seed is None:
        return tokens, captured
    from sglang.srt.layers.sampler import sampling_from_probs_torch
    from sglang.srt.sampling.sampling_params import TOP_K_ALL

    alone = (info.top_ks == TOP_K_ALL) & (info.top_ps == 1.0)
    drawn = sampling_from_probs_torch(probs, sampling_seed=info.sampling_seed, positions=positions)
    return drawn.where(alone, tokens), captured
