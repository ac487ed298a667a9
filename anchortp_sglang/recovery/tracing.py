"""A recovery as OpenTelemetry spans, where SGLang's tracing is on (``--enable-trace``).

SGLang's own spans hang on requests (TraceReqContext in observability/trace.py), and a recovery is none: it gets a trace
of its own from the provider that SGLang has set up, with a span for each stage and one for each new rank.
"""

import time

from anchortp_sglang.recovery.record import Recovery

TRACER = "anchortp"


def export(recovery: Recovery) -> None:
    """Send the spans of a recovery that is over; nothing unless SGLang traces."""
    from sglang.srt.observability.trace import get_global_tracing_enabled

    if get_global_tracing_enabled():
        make_spans(recovery, time.time_ns() - time.monotonic_ns())


def make_spans(recovery: Recovery, epoch_ns: int) -> None:
    """``epoch_ns``: wall clock minus monotonic clock, as spans are in Unix time."""
    from opentelemetry import trace

    tracer = trace.get_tracer(TRACER)
    began_ns = epoch_ns + round(recovery.began * 1e9)

    def at(seconds: float) -> int:
        return began_ns + round(seconds * 1e9)

    told = recovery.to_json()
    end_s = max((stage["at_s"] for stage in told["stages"]), default=0.0)
    scalars = {f"anchortp.{key}": value for key, value in told.items() if isinstance(value, (str, int, float))}
    whole = tracer.start_span("recovery", start_time=began_ns, attributes=scalars)
    inside = trace.set_span_in_context(whole)
    before_s = 0.0
    for stage in told["stages"]:
        tracer.start_span(stage["name"], inside, start_time=at(before_s)).end(at(stage["at_s"]))
        before_s = stage["at_s"]
    for rank in recovery.ranks:
        attributes = {"anchortp.rank": rank["rank"], "anchortp.device": rank["device"]}
        times = [stage["at_s"] for stage in rank["stages"]]
        if times:
            span = tracer.start_span(f"rank {rank['rank']}", inside, start_time=at(times[0]), attributes=attributes)
            for stage in rank["stages"]:
                span.add_event(stage["name"], timestamp=at(stage["at_s"]))
            span.end(at(times[-1]))
    if recovery.failed is not None:
        whole.set_status(trace.StatusCode.ERROR, recovery.failed)
    whole.end(at(end_s))
