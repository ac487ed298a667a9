"""Exports a recovery as OpenTelemetry spans, where SGLang's tracing is on (``--enable-trace``).

SGLang's own spans belong to requests (TraceReqContext in observability/trace.py). A recovery is none, so it gets its
own trace from the provider that SGLang has set up, with a span for each stage and one for each new rank.
"""

import time

from anchortp_sglang.recovery.report.record import Recovery
from anchortp_sglang.recovery.report.stages import end_s, rows

TRACER = "anchortp"


def export(recovery: Recovery) -> None:
    """Send the spans of a finished recovery; nothing unless SGLang traces."""
    from sglang.srt.observability.trace import get_global_tracing_enabled

    if get_global_tracing_enabled():
        make_spans(recovery, time.time_ns() - time.monotonic_ns())


def make_spans(recovery: Recovery, epoch_ns: int) -> None:
    """Make the spans. ``epoch_ns``: wall clock minus monotonic clock, as spans are in Unix time."""
    from opentelemetry import trace
    from opentelemetry.context import Context

    tracer = trace.get_tracer(TRACER)
    began_ns = epoch_ns + round(recovery.began * 1e9)

    def at(seconds: float) -> int:
        return began_ns + round(seconds * 1e9)

    record = recovery.to_json()
    server, *ranks = rows(record)
    scalars = {f"anchortp.{key}": value for key, value in record.items() if isinstance(value, (str, int, float))}
    whole = tracer.start_span("recovery", Context(), start_time=began_ns, attributes=scalars)
    inside = trace.set_span_in_context(whole)
    for bar in server.bars:
        tracer.start_span(bar.stage, inside, start_time=at(bar.start_s)).end(at(bar.end_s))
    for row in ranks:
        if row.bars:
            span = tracer.start_span(row.label, inside, start_time=at(row.bars[0].start_s))
            for bar in row.all_bars:
                span.add_event(bar.stage, timestamp=at(bar.end_s))
            span.end(at(row.all_bars[-1].end_s))
    if recovery.failed is not None:
        whole.set_status(trace.StatusCode.ERROR, recovery.failed)
    whole.end(at(end_s(record)))
