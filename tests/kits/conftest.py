"""One server of ours for tests that others have written: SGLang's own, and calls of the OpenAI client."""

import os

import pytest
from openai_calls import ask_all
from remains import Place

from anchortp_sglang.platforms.cpu import sgl_kernel_stub
from anchortp_sglang.testing.server import Server
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint

ARGUMENTS = ("--dtype", "float32", "--device", "cpu", "--max-total-tokens", "32768")
SIDES = {
    "ours": (4, "anchortp_sglang.launch_server", ("--anchor-allow-injection",)),
    "stock": (1, "anchortp_sglang.testing.stock_server", ()),
}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A checkpoint with a vocabulary that holds the token ids that kits send: up to 31999."""
    shape = {"hidden_size": 128, "num_layers": 2, "num_q_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    folder = tmp_path_factory.mktemp("kits") / "qwen3"
    return write_checkpoint(
        folder, "qwen3", intermediate_size=128, vocab_size=32000, max_position_embeddings=32768, **shape
    )


@pytest.fixture(scope="session")
def sglang_here():
    """SGLang can be imported in this process, and asks nothing of a network."""
    sgl_kernel_stub.install()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="session")
def server(model, tmp_path_factory, sglang_here):
    """Ours; or stock SGLang with ANCHORTP_KITS=stock, to see what it fails as well."""
    tp_size, module, more = SIDES["stock" if os.environ.get("ANCHORTP_KITS") == "stock" else "ours"]
    place = Place(tmp_path_factory.mktemp("server") / "log")
    try:
        with Server(model, tp_size, *ARGUMENTS, *more, log=place.log, module=module, env=place.env) as server:
            yield server
    finally:
        place.remove()


@pytest.fixture(scope="session")
def answers(server):
    """What the calls of the OpenAI client give when nothing happens."""
    return ask_all(server.url)
