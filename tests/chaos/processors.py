"""Custom logit processors as clients send them; ranks import this module, tests do not."""

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor, ThinkingBudgetLogitProcessor


class ThinkingBudget(ThinkingBudgetLogitProcessor):
    """SGLang's, for the tokens of the tiny tokenizer: it reads the request's own tokens."""

    THINKING_START_TOKEN_ID = 500
    THINKING_END_TOKEN_ID = 507
    NEW_LINE_TOKEN_ID = 199


class Failing(CustomLogitProcessor):
    def __call__(self, logits, custom_param_list=None):
        raise RuntimeError("this processor always fails")
