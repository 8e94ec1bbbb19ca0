"""`actserve serve`."""

from __future__ import annotations

import gc
import logging.config
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from actserve.cli.stores import DEFAULT_STORE, Store, TrustOption
from actserve.cli.terminal import console, flag

if TYPE_CHECKING:
    from actserve.core.settings import Settings

log = logging.getLogger("actserve")

LogFormat = Literal["human", "json"]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port.", envvar="ACTSERVE_WORKERS")] = 1,
    runtime: Annotated[
        Literal["auto", "onnx", "pt2"], typer.Option(help="Which program to run.", envvar="ACTSERVE_RUNTIME")
    ] = "auto",
    policy: Annotated[str | None, typer.Option(help="The policy behind /act; by default the first by name.")] = None,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port for the Open Inference Protocol over gRPC too.")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of 127.0.0.1 for administration; ACTSERVE_ADMIN_TOKEN opens it."),
    ] = None,
    trust: TrustOption = None,
    require_signature: Annotated[
        bool, flag("--require-signature", says="Serve nothing that no trusted key signed.")
    ] = False,
    log_format: Annotated[LogFormat | None, typer.Option(help="Lines for people, or one JSON object each.")] = None,
    access_log: Annotated[bool, flag("--access-log", says="Log each request on the routes.")] = False,
    tokens: Annotated[
        Path | None, typer.Option(help="Let nobody in without a token of this file.", envvar="ACTSERVE_TOKENS")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Speak TLS with this certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key (PEM).")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Let pages of this origin ask from a browser; may be repeated.")
    ] = None,
) -> None:
    """Serve every policy of a store over HTTP."""
    gc.disable()  # there is no garbage yet, and looking for it is a tenth of what starting takes
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy multiplies no matrices here; its threads would not fork
    from actserve.core.settings import PREFIX, Settings
    from actserve.server.app import check
    from actserve.server.processes.address import Address
    from actserve.server.processes.supervisor import Supervisor
    from actserve.server.processes.worker import serving
    from actserve.telemetry import logs

    gc.enable()
    given = {
        "store": store,
        "runtime": runtime,
        "policy": policy,
        "workers": workers,
        "grpc_host": host,
        "grpc_port": grpc_port,
        "admin_port": admin_port,
        "trust": trust,
        "require_signature": require_signature,
        "log_format": log_format,
        "access_log": access_log,
        "tokens": tokens,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "cors_origins": cors_origin and ",".join(cors_origin),
    }
    named = {PREFIX + name.upper(): str(value) for name, value in given.items() if value}
    settings = Settings.from_environment({**os.environ, **named})  # a wrong value ends here, not in a worker
    check(settings)
    if settings.tokens is None and not (uds or host in LOOPBACK):
        console().print("[yellow]whoever can connect may ask:[/] see --tokens")
    logging.config.dictConfig(logs.configuration(settings.log_format))
    address = Address(host, port, uds)
    with _files(settings) as complete:
        supervisor = Supervisor(address, workers, serving(complete.absolute()))
        log.info("listening on %s", address)
        code = supervisor.run()
    raise typer.Exit(code)


@contextmanager
def _files(settings: Settings) -> Iterator[Settings]:
    """With the files that all workers share, and those after them: the ones named, which must be usable, or temporary
    ones."""
    from actserve.server.sessions import Limits, Sessions

    if settings.sessions is not None:
        with Sessions(settings.sessions, Limits()):
            pass
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        temporary = {"sessions": Path(folder) / "sessions.sqlite", "counts": Path(folder) / "counts.sqlite"}
        yield settings.model_copy(update={name: getattr(settings, name) or path for name, path in temporary.items()})
