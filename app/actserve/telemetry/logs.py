"""Log lines, for people or as JSON objects. Both contain the request id."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import pydantic_core

from actserve.telemetry.call import current

FORMATS = {"human": "actserve.telemetry.logs.HumanFormatter", "json": "actserve.telemetry.logs.JsonFormatter"}
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}  # fields of every record


class HumanFormatter(logging.Formatter):
    """Time, level, logger, message, and the request id in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, overrides logging's method
        call = current.get()
        line = super().formatMessage(record)
        return line if call is None else f"{line} [{call.id}]"


class JsonFormatter(logging.Formatter):
    """Fields: time (UTC), level, logger, message; if present, request, trace, exception and the record's `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = current.get()
        if call is not None:
            document["request"] = call.id
            if call.trace is not None:
                document["trace"] = call.trace
        document |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return pydantic_core.to_json(document, fallback=str).decode()


def configuration(log_format: str) -> dict[str, Any]:
    """The argument of `logging.config.dictConfig` for every worker: all lines go to stderr."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": FORMATS[log_format]}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
    }
