"""Runs a rank: its entry points, the gate of its generation, the seeding of resumed requests.

Replaces ``run_scheduler_process`` (managers/scheduler.py), which answers an exception with SIGQUIT to its parent: here
that is the zygote. A rank that fails reports it on its pipe and dies; the coordinator sees its pidfd.

A rank is either run at once, or stands by first (``rank/standby.py``): all of it is built while its predecessor serves,
and the rest, which reads what that one leaves behind, follows when main says so.
"""

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import setproctitle

from anchortp_sglang.rank import grammars, handover, heartbeat, leave, measure, standby
from anchortp_sglang.rank.attachment import HOST_DEVICE, Assignment, Attachment, attach, control_segment, current
from anchortp_sglang.rank.crash import describe
from anchortp_sglang.rank.kv.following import follow
from anchortp_sglang.rank.kv.prefixes import no_prefixes, open_prefixes
from anchortp_sglang.rank.kv.restore import RestorationFailed
from anchortp_sglang.rank.messages import CONTEXT_TOKENS, GenerationStart, Resume
from anchortp_sglang.rank.rehearsal import rehearse
from anchortp_sglang.rank.spare import await_order, rendezvous
from anchortp_sglang.rank.stamps import Stamps
from anchortp_sglang.rank.warmup import warm_up
from anchortp_sglang.rank.weights import loader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSpec:
    """Data that a forked process needs to become rank ``assignment.rank``."""

    assignment: Assignment
    server_args: Any
    port_args: Any
    store_port: int


def run(spec: RankSpec, pipe: Connection) -> None:
    """Run one rank until it is killed.

    Sends ("ready", info), ("unrestored", text) or ("failed", text) to main; after "ready", a Crash if it fails.
    """
    stamps = Stamps()
    try:
        attachment = _attach(spec.assignment)
        attachment.prefixes = open_prefixes(attachment)
        stamps.take("attached")
        rendezvous(spec.store_port)
        scheduler = _make_scheduler(spec)
        info = _complete(attachment, scheduler, stamps)
    except BaseException as error:
        return _report(error, pipe)
    _serve(scheduler, info, pipe)


def run_later(spec: RankSpec, pipe: Connection) -> None:
    """Build one rank and let it stand by, until main gives the order to run it or closes the pipe.

    Sends None when it stands by, or ("failed", text); then like ``run``.
    """
    try:
        with standby.low_priority():
            warm_up()
            attachment = _attach(spec.assignment)
            rendezvous(spec.store_port)
            attachment.prefixes = no_prefixes(attachment)
            scheduler = _make_scheduler(replace(spec, port_args=standby.apart(spec.port_args)))
            rehearse(scheduler, attachment)
        following = follow(attachment)
    except BaseException as error:
        return _report(error, pipe)
    running = await_order(pipe)
    stamps = Stamps()
    try:
        attachment.assignment = replace(attachment.assignment, running=running)
        attachment.stand_by_no_more()
        attachment.prefixes = open_prefixes(attachment, following)
        stamps.take("attached")
        attachment.prefixes.build(attachment.cache)
        del following
        standby.connect(scheduler, spec.port_args)
        setproctitle.setproctitle(attachment.title)
        info = _complete(attachment, scheduler, stamps)
    except BaseException as error:
        return _report(error, pipe)
    _serve(scheduler, info, pipe)


def _report(error: BaseException, pipe: Connection) -> None:
    traceback.print_exception(error)
    kind = "unrestored" if isinstance(error, RestorationFailed) else "failed"
    pipe.send((kind, f"{type(error).__name__}: {error}"))


def _serve(scheduler: Any, info: dict[str, Any], pipe: Connection) -> None:
    pipe.send(("ready", info))
    attachment = current()
    assert attachment is not None
    handover.answer_on(pipe, lambda: [fd for fd, _ in attachment.fds.values()])
    try:
        scheduler.run_event_loop()
        if attachment.leaving:
            leave.leave(scheduler, attachment, pipe)
    except BaseException as error:
        pipe.send(("crashed", describe(error)))
        raise


def _attach(assignment: Assignment) -> Attachment:
    attachment = attach(assignment)
    attachment.filler = loader.start_filling(attachment)
    segment = control_segment(assignment.generation, assignment.standby)
    control = attachment.map(HOST_DEVICE, segment, writable=True)
    attachment.counters = heartbeat.Counters(control, assignment.rank)
    region = memoryview(control)[heartbeat.BYTES :]
    attachment.collectives = assignment.platform.make_collectives(
        region, assignment.rank, assignment.ownership.tp_size, attachment.counters.beat
    )
    return attachment


def _complete(attachment: Attachment, scheduler: Any, stamps: Stamps) -> dict[str, Any]:
    """Wait until all that the rank takes over is in place, and describe the rank for main."""
    assignment = attachment.assignment
    kv_retained_at = attachment.prefixes.finish()
    stamps.take("bound")
    filler, retained = attachment.filler, attachment.prefixes.report
    built = {"groups": filler.waited_from, "moved": filler.finished_at, "weights_bound": filler.bound_at}
    stamps.taken |= {name: at for name, at in built.items() if at >= stamps.began}  # not what was ready before
    if retained:
        stamps.taken["prefixes"] = retained["at"]
    if kv_retained_at:
        stamps.taken["kv_kept"] = kv_retained_at
    return {
        "scheduler": scheduler.get_init_info(),  # SGLang's own, which /server_info shows
        "rank": assignment.rank,
        "device": assignment.device,
        "moved_bytes": filler.moved,
        "rebuilt": retained,
        "fds": attachment.fds,
        "stamps": stamps.taken,
    }


def _make_scheduler(spec: RankSpec) -> Any:
    from sglang.srt.managers.scheduler import Scheduler, configure_scheduler_process
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank

    rank = spec.assignment.rank
    gpu_id = spec.assignment.platform.gpu_id(spec.assignment.device, rank)
    world_rank = spawn_world_rank(spec.server_args, tp_rank=rank, pp_rank=0)
    publish(
        spec.server_args,
        role="scheduler",
        ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=gpu_id),
    )
    configure_scheduler_process(spec.server_args, gpu_id)
    if spec.assignment.standby:
        attachment = current()
        assert attachment is not None
        attachment.title = standby.rename(rank)
    scheduler = Scheduler(spec.server_args, spec.port_args)
    leave.listen(scheduler, current())
    measure.listen(scheduler, current())
    return scheduler


def after_pull_raw_reqs(requests: list[Any] | None, receiver: Any) -> list[Any] | None:
    """AFTER SchedulerRequestReceiver._pull_raw_reqs: every rank's loop passes here, rank 0 with requests.

    A generation starts when all its ranks are ready. TokenizerManager's PUSH socket may still hold requests meant for
    the dead rank 0; they arrive first.
    """
    attachment = current()
    if attachment is None:
        return requests
    attachment.counters.beat()
    if attachment.rehearsal is not None:
        return attachment.rehearsal.pull(requests)
    if not requests:
        return requests
    accepted = []
    for request in requests:
        if isinstance(request, GenerationStart):
            if request.generation == attachment.assignment.generation:
                attachment.serving = True
                attachment.prefixes.start_writing()
        elif attachment.serving:
            accepted.append(request)
    return accepted


def after_create_generation_req(req: Any, scheduler: Any, received: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER Scheduler._create_generation_req: restore a request's state at its last delivered token."""
    if isinstance(received, Resume):
        req.anchortp_resumed_at = len(req.origin_input_ids) + len(received.delivered)
        if received.delivered:
            _seed(scheduler, req, received)
    return req


def around_add_request_to_queue(
    original: Callable[..., None], scheduler: Any, req: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND Scheduler._add_request_to_queue: a resumed request has been admitted before, and may have tokens.

    Its grammar is ready now, and follows them.

    A client that has tokens has the input's logprobs, too. SGLang reuses no KV after the start of the requested
    logprobs (``Req._compute_max_prefix_len``), so this start is set behind all tokens. handle_generate_request sets it
    after the request is made, and accepts none after the prompt.

    Requests that wait to be resumed do not count for --max-queued-requests, and make no room for others of a higher
    priority (``Scheduler._abort_on_queued_limit``): most of them were running.
    """
    grammars.restore(req, scheduler.batch_result_processor)
    if _is_resumed(req) and req.return_logprob and req.output_ids:
        req.logprob_start_len = len(req.origin_input_ids) + len(req.output_ids)
    limit = scheduler.max_queued_requests
    if limit is None:
        return original(scheduler, req, *args, **kwargs)
    queue = scheduler.waiting_queue
    resumed = [waiting for waiting in queue if _is_resumed(waiting)]
    queue[:] = [waiting for waiting in queue if not _is_resumed(waiting)]
    scheduler.max_queued_requests = None if _is_resumed(req) else limit
    try:
        return original(scheduler, req, *args, **kwargs)
    finally:
        scheduler.max_queued_requests = limit
        queue[:0] = resumed


def _is_resumed(req: Any) -> bool:
    return getattr(req, "anchortp_resumed_at", None) is not None


def _seed(scheduler: Any, req: Any, received: Resume) -> None:
    delivered = len(received.delivered)
    req.output_ids.extend(received.delivered)
    grammars.expect(req)
    req.send_token_offset = delivered
    req.send_decode_id_offset = min(CONTEXT_TOKENS, len(req.origin_input_ids_unpadded)) + delivered
    # As after a retraction: origin + output are prefilled again (refresh_fill_ids). The stain freezes cached_tokens,
    # which the client has received already.
    req.retracted_stain = req.is_retracted = True
    req.cached_tokens = received.cached_tokens
    if req.return_logprob:
        _seed_logprobs(req, delivered)
    scheduler.batch_result_processor._maybe_update_reasoning_tokens(req, list(received.delivered))


def _seed_logprobs(req: Any, delivered: int) -> None:
    """Pad output logprobs of delivered tokens: lists are sliced by output index. Never resend input logprobs."""
    req.input_logprob_sent = True
    logprob = req.logprob
    logprob.input_token_logprobs_val = logprob.input_token_logprobs_val or []
    logprob.output_token_logprobs_val.extend([0.0] * delivered)
    logprob.output_token_logprobs_idx.extend([0] * delivered)
    for name in ("top_logprobs_val", "top_logprobs_idx", "token_ids_logprobs_val", "token_ids_logprobs_idx"):
        getattr(logprob, f"output_{name}").extend([[]] * delivered)
    req.send_output_token_logprobs_offset = delivered


def before_process_batch_result_prefill(processor: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE SchedulerBatchResultProcessor.process_batch_result_prefill: count what resumed requests reused."""
    attachment = current()
    if attachment is None or attachment.assignment.rank != 0:
        return
    for req, prefix_len, extend_len in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
        end = getattr(req, "anchortp_resumed_at", None)
        if end is None:
            continue
        first_chunk = not hasattr(req, "anchortp_counted")
        attachment.counters.count_tokens(prefix_len if first_chunk else 0, extend_len)
        req.anchortp_counted = True
        if prefix_len + extend_len >= end:
            req.anchortp_resumed_at = None
