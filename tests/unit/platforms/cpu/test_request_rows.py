"""The table of requests' slots: what SGLang makes, in memory that is taken when it is touched."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from anchortp_sglang.platforms.cpu import request_rows, sgl_kernel_stub

ROWS, COLUMNS = 512, 100_000
NBYTES = 4 * (ROWS + 1) * COLUMNS


@pytest.fixture
def make(monkeypatch):
    """make(in_rank): a pool, as SGLang or a rank of ours makes it."""
    sgl_kernel_stub.install()
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    stock = ReqToTokenPool.__init__

    def make(in_rank):
        monkeypatch.setattr(request_rows, "current", lambda: SimpleNamespace() if in_rank else None)
        pool = ReqToTokenPool.__new__(ReqToTokenPool)
        request_rows.around_req_to_token_pool_init(
            stock, pool, size=ROWS, max_context_len=COLUMNS, device="cpu", enable_memory_saver=False
        )
        return pool

    return make


def test_a_pool_is_that_of_sglang_and_takes_no_memory_yet(make):
    before = psutil.Process().memory_info().rss
    pool = make(in_rank=True)
    assert psutil.Process().memory_info().rss - before < NBYTES / 10
    stock = make(in_rank=False)
    assert torch.equal(pool.req_to_token, stock.req_to_token)
    assert pool.req_to_token.dtype == stock.req_to_token.dtype and pool.req_to_token.is_contiguous()
    for name in ("size", "max_context_len", "free_slots"):
        assert getattr(pool, name) == getattr(stock, name)


def test_rows_keep_what_is_written(make):
    pool = make(in_rank=True)
    pool.write((torch.tensor([1, ROWS]), slice(0, 3)), torch.tensor([7, 8, 9], dtype=torch.int32))
    assert pool.req_to_token[[1, ROWS], :4].tolist() == [[7, 8, 9, 0]] * 2
    assert pool.req_to_token[2:ROWS].count_nonzero() == 0
