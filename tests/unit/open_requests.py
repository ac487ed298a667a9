"""What stands around InflightRequests in tests: TokenizerManager's open requests, and messages."""

from array import array
from types import SimpleNamespace

from anchortp_sglang.platforms.cpu import sgl_kernel_stub

sgl_kernel_stub.install()

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from anchortp_sglang.rank import messages  # noqa: E402

messages.register()


def tokenized(rid, *input_ids):
    return TokenizedGenerateReqInput(
        rid=rid, input_text=None, input_ids=array("q", input_ids or (1, 2, 3)), input_embeds=None, mm_inputs=None,
        token_type_ids=None, sampling_params=SamplingParams(), return_logprob=False, logprob_start_len=-1,
        top_logprobs_num=0, token_ids_logprob=None, stream=False,
    )  # fmt: skip


class Manager:
    """Stands where TokenizerManager does: its open requests, and how it is told that one has ended."""

    def __init__(self):
        self.rid_to_state, self.ended, self.is_pause = {}, {}, False
        self.event_loop = SimpleNamespace(call_later=lambda *about: SimpleNamespace(cancel=lambda: None))

    def open(self, *rids):
        for rid in rids:
            self.rid_to_state[rid] = SimpleNamespace(output_ids=[], abort_sent=False, get_text=str)

    def _handle_abort_req(self, message):
        if message.rid.startswith("HEALTH_CHECK"):
            return
        self.ended[message.rid] = message.finished_reason
        self.rid_to_state.pop(message.rid, None)


def dispatch(inflight, manager, *rids):
    for rid in rids:
        manager.open(rid)
        inflight.dispatch(tokenized(rid))


def names(sent):
    return [(type(message).__name__, message.rid) for message in sent]
