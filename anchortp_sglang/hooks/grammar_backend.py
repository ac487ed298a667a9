"""Prepares the grammar backend in main, before the zygote is forked, as far as a fork can share it.

Each rank makes its own when it starts (``create_grammar_backend``, constrained/base_grammar_backend.py). xgrammar sorts
the vocabulary for it: 0.6 s for 150,000 tokens, in each rank of each recovery. The sorted vocabulary never changes and
has no thread, so main makes it once. llguidance starts threads with its own, which no fork survives: there each rank
does it all.
"""

import importlib
import logging
from typing import Any

log = logging.getLogger(__name__)

_MODULE = "sglang.srt.constrained.{}_backend"


def prepare(view: Any, tokenizer: Any) -> None:
    """Import the backend that ``view`` (resolved ServerArgs) names; sort xgrammar's vocabulary. A failure only logs."""
    name = view.grammar_backend
    if name == "none" or view.skip_tokenizer_init:
        return
    try:
        importlib.import_module(_MODULE.format(name))
        if name == "xgrammar":
            _share_vocabulary(view, tokenizer)
    except Exception as error:  # a rank reports it, or does without grammars, as in SGLang
        log.info("anchortp: the grammar backend %s is not prepared (%s)", name, error)


def _share_vocabulary(view: Any, tokenizer: Any) -> None:
    """Give the tokenizer SGLang's seam for those that bring their vocabulary along, with what it would make itself."""
    from sglang.srt.configs.model_config import ModelConfig
    from xgrammar import TokenizerInfo

    if hasattr(tokenizer, "init_xgrammar"):
        return
    model = ModelConfig.from_server_args(view)
    ends = list(model.hf_eos_token_id) or None
    vocabulary = TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.vocab_size, stop_token_ids=ends)
    tokenizer.init_xgrammar = lambda: (vocabulary, None)
