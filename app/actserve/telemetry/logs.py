"""Log lines: for people, or one JSON object each. Both say which request a line is about."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import pydantic_core

from actserve.telemetry.call import current

FORMATS = {"human": "actserve.telemetry.logs.HumanFormatter", "json": "actserve.telemetry.logs.JsonFormatter"}
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}  # what every record has


class HumanFormatter(logging.Formatter):
    """Time, level, logger, message, and the request in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, logging's name
        call = current.get()
        line = super().formatMessage(record)
        return line if call is None else f"{line} [{call.id}]"


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message; request and trace, if there are; what a line has as `extra`; exception."""

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
    """For `logging.config.dictConfig`, in every worker: all lines to stderr."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": FORMATS[log_format]}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
    }
