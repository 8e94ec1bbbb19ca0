"""Traces: FastAPI makes a span for each request on the routes, and here are two below it: in the queue, in the program.

Off unless OpenTelemetry's own variable OTEL_EXPORTER_OTLP_ENDPOINT is set, and the extra `otel` installed. Its other
variables hold too: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and so on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace

from actserve.telemetry.call import Call

log = logging.getLogger("actserve")

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PROBES = {"/healthz", "/readyz", "/metrics"}


class Traces:
    """Where spans go; nowhere if `environment` does not say, or if what sends them is not installed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._provider = _provider(environment) if environment.get(ENDPOINT) else None

    def close(self) -> None:
        """Send what has not been sent; this blocks."""
        if self._provider is not None:
            self._provider.shutdown()

    @property
    def of_requests(self) -> Any:
        """What FastAPI takes as `telemetry`. Not the streams: a span that lasts for hours helps nobody."""
        return {
            "tracer_provider": self._provider,
            "tracing": self._provider is not None,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": lambda scope: scope["type"] == "websocket" or scope["path"] in _PROBES,
        }

    def begin(self, call: Call) -> None:
        """Tell the call which trace it is in."""
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            call.trace = f"{span.trace_id:032x}"

    def end(self, call: Call, policy: str) -> None:
        """The answer is about to leave: what the call came to goes into its span."""
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attributes({"actserve.request_id": call.id, "actserve.policy": policy})
        if call.reason is not None:
            span.set_attribute("actserve.reason", call.reason)
        tracer = trace.get_tracer("actserve", tracer_provider=self._provider)
        epoch_ns = time.time_ns() - time.perf_counter_ns()  # of the monotonic clock
        for act in call.acts:
            begun_ns = epoch_ns + act.since_ns
            for name, ns in (("queue", act.queue_ns), ("inference", act.run_ns)):
                child = tracer.start_span(name, start_time=begun_ns)
                begun_ns += ns
                child.end(begun_ns)


def _provider(environment: Mapping[str, str]) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        log.warning('no traces: %s is not installed; pip install "actserve[otel]"', error.name)
        return None
    named = Resource.create({SERVICE_NAME: environment.get("OTEL_SERVICE_NAME", "actserve")})
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
