"""`python -m actserve.server.healthcheck`: exit code 0 if the service on this host is ready, else 1.

A container's health check runs it every few seconds, so it imports only the standard library.
"""

from __future__ import annotations

import sys
from http.client import HTTPConnection, HTTPException

PORT = 8000
TIMEOUT_S = 2.0


def ready(port: int = PORT) -> bool:
    """Whether `/readyz` on 127.0.0.1 answers 200 within `TIMEOUT_S`."""
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not ready())
