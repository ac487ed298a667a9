"""Unequal shards compute what one device computes: tokens and logprobs of stock SGLang at TP=1."""

import functools

import pytest

MOST_APART = 1e-4
NEW_TOKENS = 32
PROMPTS = [[(7 * position + 31 * seed) % 480 for position in range(n)] for seed, n in enumerate((1, 5, 33, 128, 300))]

LAYOUTS = [
    pytest.param("qwen3", {"tp_size": 1}, id="qwen3-tp1"),
    pytest.param("qwen3", {"tp_size": 2}, id="qwen3-tp2"),
    pytest.param("qwen3", {"tp_size": 3, "anchor_widths": "2,1,1"}, id="qwen3-2,1,1"),
    pytest.param("qwen3", {"tp_size": 3, "anchor_widths": "1,2,1"}, id="qwen3-1,2,1"),
    pytest.param("qwen3", {"tp_size": 4}, id="qwen3-tp4"),
    pytest.param("qwen2", {"tp_size": 3}, id="qwen2-tp3-replicated-kv"),
    pytest.param("qwen2", {"tp_size": 4}, id="qwen2-tp4-replicated-kv"),
    pytest.param("llama", {"tp_size": 3}, id="llama-tp3"),
    pytest.param("mistral", {"tp_size": 3}, id="mistral-tp3"),
    pytest.param("phi3", {"tp_size": 3}, id="phi3-tp3-fused-tensors"),
    pytest.param("glm4", {"tp_size": 3}, id="glm4-tp3"),
    pytest.param("mixtral", {"tp_size": 3}, id="mixtral-tp3-columns"),
    pytest.param("mixtral", {"tp_size": 3, "ep_size": 3}, id="mixtral-ep3"),
    pytest.param("qwen3_moe", {"tp_size": 3, "anchor_widths": "1,2,1"}, id="qwen3_moe-1,2,1-columns"),
    pytest.param("qwen3_moe", {"tp_size": 2}, id="qwen3_moe-tp2-columns"),
    pytest.param("qwen3_moe", {"tp_size": 4}, id="qwen3_moe-tp4-columns"),
    pytest.param("qwen3_moe", {"tp_size": 3, "ep_size": 3}, id="qwen3_moe-ep3"),
    pytest.param("qwen3_moe", {"tp_size": 2, "ep_size": 2}, id="qwen3_moe-ep2"),
]


@pytest.fixture(scope="session")
def reference(forge, checkpoint):
    """family -> what stock SGLang answers, asked once for each."""
    return functools.cache(
        lambda family: forge.value(
            "engine_jobs:stock_generate",
            model=str(checkpoint[family]),
            prompts=PROMPTS,
            max_new_tokens=NEW_TOKENS,
        )
    )


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_tokens_and_logprobs_are_those_of_stock_on_one_device(forge, checkpoint, reference, places, family, layout):
    answers = forge.value(
        "engine_jobs:anchored_generate",
        model=str(checkpoint[family]),
        prompts=PROMPTS,
        max_new_tokens=NEW_TOKENS,
        env=places,
        **layout,
    )
    expected = reference(family)
    assert [answer["ids"] for answer in answers] == [answer["ids"] for answer in expected]
    for name in ("logprobs", "prompt_logprobs"):
        assert apart(answers, expected, name) <= MOST_APART


def apart(answers, expected, name):
    pairs = [
        pair for one, other in zip(answers, expected, strict=True) for pair in zip(one[name], other[name], strict=True)
    ]
    assert len(pairs) >= len(PROMPTS)
    return max(abs(one - other) for one, other in pairs)


@pytest.mark.parametrize("family", sorted({layout.values[0] for layout in LAYOUTS}))
def test_the_reference_wanders_so_that_an_error_would_show(reference, family):
    """A model that repeats one token would pass any comparison."""
    for answer in reference(family):
        assert len(answer["ids"]) == NEW_TOKENS
        assert len(set(answer["ids"])) > NEW_TOKENS // 2
