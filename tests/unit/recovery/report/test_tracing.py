"""A recovery as spans, received by a tracer provider that writes them down (OpenTelemetry's API without its SDK)."""

from contextlib import contextmanager

import pytest
from opentelemetry import trace

from anchortp_sglang.recovery.report.record import Recoveries
from anchortp_sglang.recovery.report.tracing import TRACER, make_spans


class Span(trace.NonRecordingSpan):
    def __init__(self, number, name, parent, start_time, attributes):
        super().__init__(trace.SpanContext(7, number, False, trace.TraceFlags(1)))
        self.name, self.parent, self.start, self.attributes = name, parent, start_time, dict(attributes or {})
        self.events, self.status, self.ended = [], None, None

    def add_event(self, name, attributes=None, timestamp=None):
        self.events.append((name, timestamp))

    def set_status(self, status, description=None):
        self.status = (status, description)

    def end(self, end_time=None):
        self.ended = end_time


class Tracer(trace.Tracer):
    def __init__(self):
        self.spans = []

    def start_span(self, name, context=None, attributes=None, start_time=None, **_):
        parent = trace.get_current_span(context) if context else None
        self.spans.append(Span(len(self.spans) + 1, name, parent, start_time, attributes))
        return self.spans[-1]

    @contextmanager
    def start_as_current_span(self, *args, **kwargs):
        raise NotImplementedError


@pytest.fixture
def tracer(monkeypatch):
    made = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda name: made if name == TRACER else None)
    return made


def finished():
    recovery = Recoveries().begin()
    recovery.began = 10.0
    recovery.cause, recovery.requests_replayed = "device", 8
    recovery.stages = [("detected", 0.0), ("reaped", 0.1), ("planned", 0.15), ("first_token", 0.5)]
    steps = [{"name": "attached", "at_s": 0.2}, {"name": "bound", "at_s": 0.4}]
    recovery.ranks = [{"rank": 0, "device": 3, "stages": steps, "moved_bytes": 0}]
    return recovery


def test_a_recovery_is_one_trace_with_its_stages_and_ranks_in_unix_time(tracer):
    make_spans(finished(), epoch_ns=1_000_000_000_000)
    whole, *inner = tracer.spans
    assert (whole.name, whole.start, whole.ended) == ("recovery", 1_010_000_000_000, 1_010_500_000_000)
    assert whole.attributes["anchortp.cause"] == "device"
    assert whole.attributes["anchortp.requests_replayed"] == 8
    assert [span.name for span in inner] == ["detected", "reaped", "planned", "first_token", "device 3"]
    assert all(span.parent is whole and span.ended is not None for span in inner)
    assert (inner[3].start, inner[3].ended) == (1_010_150_000_000, 1_010_500_000_000)
    assert (inner[4].start, inner[4].ended) == (1_010_150_000_000, 1_010_400_000_000), "from being told what to be"
    assert inner[4].events == [("attached", 1_010_200_000_000), ("bound", 1_010_400_000_000)]


def test_a_recovery_that_was_given_up_is_an_error(tracer):
    recovery = finished()
    recovery.failed = "too few devices"
    make_spans(recovery, epoch_ns=0)
    assert tracer.spans[0].status == (trace.StatusCode.ERROR, "too few devices")
