"""OpenTelemetry spans of requests and their stages, sent over OTLP. The SDK is imported only when an endpoint is set."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from scalabl import __version__
from scalabl.errors import ScalaBLError
from scalabl_server.observe.trace import RequestTrace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

SECONDS_TO_FLUSH = 5


class SpansError(ScalaBLError):
    """`--otlp-endpoint` is set, but spans cannot be sent."""


def make_spans(endpoint: str | None) -> OpenTelemetrySpans | None:
    """What sends spans to the collector at `endpoint` (`http://host:4318`), or None when there is none.

    Raises:
        SpansError: OpenTelemetry is not installed, or the endpoint is not a URL.
    """
    if endpoint is None:
        return None
    if not endpoint.startswith(("http://", "https://")):
        raise SpansError(f"--otlp-endpoint: {endpoint!r} is not a URL; write it as http://host:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SpansError("--otlp-endpoint needs OpenTelemetry; install it with: pip install 'scalabl[otel]'") from None
    resource = Resource.create({SERVICE_NAME: "scalabl", SERVICE_VERSION: __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(endpoint=url if url.endswith("/v1/traces") else f"{url}/v1/traces", timeout=SECONDS_TO_FLUSH)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetrySpans(provider)


class OpenTelemetrySpans:
    """One span per request, with a child span per stage of a prediction. The caller's trace decides about sampling."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("scalabl", __version__)
        self._running: dict[str, Span] = {}

    def begin(self, request: RequestTrace) -> None:
        """Start the request's span, as a child of the caller's span if there is one, and give its ids to the request."""
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context

        context = Context()
        if request.parent_id is not None:
            flags = TraceFlags(TraceFlags.SAMPLED if request.sampled else TraceFlags.DEFAULT)
            parent = SpanContext(int(request.trace_id, 16), int(request.parent_id, 16), is_remote=True, trace_flags=flags)
            context = set_span_in_context(NonRecordingSpan(parent), context)
        span = self._tracer.start_span("request", context, kind=SpanKind.SERVER)
        ids = span.get_span_context()
        request.trace_id, request.span_id = f"{ids.trace_id:032x}", f"{ids.span_id:016x}"
        request.sampled = ids.trace_flags.sampled
        self._running[request.span_id] = span

    def end(self, request: RequestTrace, method: str, route: str, status: int) -> None:
        """End the request's span and add the spans of its stages."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        span = self._running.pop(request.span_id)
        span.update_name(f"{method} {route}")
        attributes: dict[str, str | int | None] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "scalabl.request_id": request.request_id,
            "scalabl.key": request.key,
            "scalabl.adapter": request.adapter,
            "scalabl.inputs": request.inputs,
            "scalabl.tokens": request.tokens,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        clock_offset = time.time() - time.perf_counter()  # stages are timed with perf_counter, spans with time
        stages = request.stages
        if stages.tokenized is not None and stages.taken is not None and stages.computed is not None:
            parent = set_span_in_context(span, Context())
            for name, start, stop in (
                ("tokenize", stages.tokenized - stages.tokenizing_took, stages.tokenized),
                ("queue", stages.tokenized, max(stages.tokenized, stages.taken)),
                ("inference", stages.taken, stages.computed),
            ):
                child = self._tracer.start_span(name, parent, start_time=int((clock_offset + start) * 1e9))
                child.end(int((clock_offset + stop) * 1e9))
        span.end()

    def close(self) -> None:
        """Send the remaining spans. Blocks for at most a few seconds."""
        self._provider.force_flush(SECONDS_TO_FLUSH * 1000)
        self._provider.shutdown()
