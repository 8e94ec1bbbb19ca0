"""TLS: checks the certificate and its key."""

from __future__ import annotations

import ssl

from actserve.core.errors import UsageError
from actserve.core.settings import Settings


def check(settings: Settings) -> None:
    """Check the TLS files before the first worker starts. Raises `UsageError`."""
    if settings.tls_cert is None and settings.tls_key is None:
        return
    if settings.tls_cert is None or settings.tls_key is None:
        raise UsageError("TLS needs both a certificate and its key: --tls-cert and --tls-key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise UsageError(f"{settings.tls_cert} and {settings.tls_key} cannot be used for TLS: {error}") from error
