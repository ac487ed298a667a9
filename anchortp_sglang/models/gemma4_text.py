"""Gemma-4's language model, inside of a multimodal model's config.json.

SGLang keeps the KV of Gemma-4's sliding windows in a pool of its own, and refuses the attention backend torch_native.
Both go by the architecture's name. Under these names all layers have their KV in one pool, as Gemma-3 has, each with
heads of its own size (``rank/kv/pool.py``); torch_native computes what such layers ask for.
"""

from typing import Any

from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM


class Gemma4TextForCausalLM(Gemma4ForCausalLM):
    """Gemma-4's language model without experts. It reads its sizes from the ``text_config``."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config.text_config, quant_config, prefix)


class Gemma4TextMoeForCausalLM(Gemma4TextForCausalLM):
    """Gemma-4's language model with experts. Its name of its own tells the planner which parameters it has."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        for layer in self.model.layers:
            # The router's scale is folded into this norm, but `Gemma4RMSNorm.forward_native` would leave it out.
            layer.router.norm.with_scale = True


EntryClass = [Gemma4TextForCausalLM, Gemma4TextMoeForCausalLM]
