"""Attention of short extends is that of SGLang's own, in batches of short and long ones."""

from types import SimpleNamespace

import pytest
import torch

from anchortp_sglang.platforms.cpu import sgl_kernel_stub, short_extends

HEADS, KV_HEADS, SIZE, SLOTS = 4, 2, 16, 4096


@pytest.fixture(scope="module")
def backend():
    sgl_kernel_stub.install()
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)


def attend(backend, run, prefixes, extends, window=None, value_size=SIZE):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(SLOTS, KV_HEADS, SIZE, generator=generator)
    values = torch.randn(SLOTS, KV_HEADS, value_size, generator=generator)
    ends = [prefix + extend for prefix, extend in zip(prefixes, extends, strict=True)]
    slots = torch.randperm(SLOTS, generator=generator)
    req_to_token = torch.zeros(len(ends) + 1, max(ends), dtype=torch.int32)
    for row, end in enumerate(ends, 1):
        req_to_token[row, :end], slots = slots[:end], slots[end:]
    query = torch.randn(sum(extends), HEADS, SIZE, generator=generator)
    output = torch.full((sum(extends), HEADS, value_size), torch.nan)
    numbers = (torch.tensor(each) for each in (range(1, len(ends) + 1), ends, prefixes, extends))
    options = {"scaling": 0.3, "enable_gqa": True, "causal": True, "is_cross_attn": False}
    return run(
        backend, query, output, keys, values, req_to_token, *numbers, None, sliding_window_size=window, **options
    )


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("prefixes", "extends", "decoded"),
    [
        pytest.param([100, 300], [1, 1], 2, id="one token each"),
        pytest.param([100, 0, 300, 7], [4, 20, 3, 9], 7, id="beside a new prompt and a longer one"),
        pytest.param([0, 3], [5, 1], 0, id="none is short"),
    ],
)
def test_it_is_the_attention_of_the_whole(backend, monkeypatch, prefixes, extends, decoded, window):
    monkeypatch.setattr(short_extends, "current", lambda: SimpleNamespace())
    stock, decode, queries = type(backend)._run_sdpa_forward_extend, type(backend)._run_sdpa_forward_decode, []

    def counted(self, query, *args, **kwargs):
        queries.append(len(query))
        return decode(self, query, *args, **kwargs)

    monkeypatch.setattr(type(backend), "_run_sdpa_forward_decode", counted)
    hooked = lambda *args, **kwargs: short_extends.around_run_sdpa_forward_extend(stock, *args, **kwargs)  # noqa: E731
    expected = attend(backend, stock, prefixes, extends, window)
    assert sum(queries) == 0
    torch.testing.assert_close(attend(backend, hooked, prefixes, extends, window), expected)
    assert sum(queries) == decoded


def test_values_may_be_of_another_size_than_keys(backend, monkeypatch):
    monkeypatch.setattr(short_extends, "current", lambda: SimpleNamespace())
    stock = type(backend)._run_sdpa_forward_extend
    hooked = lambda *args, **kwargs: short_extends.around_run_sdpa_forward_extend(stock, *args, **kwargs)  # noqa: E731
    expected = attend(backend, stock, [64, 0], [2, 8], value_size=8)
    torch.testing.assert_close(attend(backend, hooked, [64, 0], [2, 8], value_size=8), expected)
