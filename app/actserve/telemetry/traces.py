"""Traces: child spans "queue" and "inference" below FastAPI's span of each request.

Off unless OpenTelemetry's own variable OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` is installed. Its other
variables work as well: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and so on.
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
    """The exporter of spans; it does nothing if `environment` sets no endpoint or `otel` is not installed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._provider = _provider(environment) if environment.get(ENDPOINT) else None

    @property
    def enabled(self) -> bool:
        return self._provider is not None

    def close(self) -> None:
        """Send the remaining spans. Blocks."""
        if self._provider is not None:
            self._provider.shutdown()

    @property
    def fastapi_telemetry(self) -> Any:
        """The `telemetry` argument of FastAPI. Streams are excluded: a span of hours is no use."""
        return {
            "tracer_provider": self._provider,
            "tracing": self._provider is not None,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": lambda scope: scope["type"] == "websocket" or _path(scope) in _PROBES,
        }

    def begin(self, call: Call) -> None:
        """Set the call's trace id."""
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            call.trace = f"{span.trace_id:032x}"

    def end(self, call: Call, policy: str) -> None:
        """Complete the call's span, just before the answer is sent."""
        span = trace.get_current_span()
        if not span.is_recording():
            return
        span.set_attributes({"actserve.request_id": call.id, "actserve.policy": policy})
        if call.reason is not None:
            span.set_attribute("actserve.reason", call.reason)
        tracer = trace.get_tracer("actserve", tracer_provider=self._provider)
        epoch_ns = time.time_ns() - time.perf_counter_ns()  # zero of the monotonic clock, as Unix time
        for act in call.acts:
            begun_ns = epoch_ns + act.since_ns
            for name, ns in (("queue", act.queue_ns), ("inference", act.run_ns)):
                child = tracer.start_span(name, start_time=begun_ns)
                begun_ns += ns
                child.end(begun_ns)


def _path(scope: Mapping[str, Any]) -> str:
    """The path below a proxy's prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _provider(environment: Mapping[str, str]) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        log.warning('no traces: %s is not installed; pip install "actserve[otel]"', error.name)
        return None
    resource = Resource.create({SERVICE_NAME: environment.get("OTEL_SERVICE_NAME", "actserve")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
