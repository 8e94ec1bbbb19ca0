"""`actserve serve`: run the service."""

from __future__ import annotations

import gc
import importlib
import logging.config
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from actserve.cli.stores import DEFAULT_STORE, Store, TrustOption
from actserve.cli.terminal import console, flag

if TYPE_CHECKING:
    from actserve.core.settings import Settings

log = logging.getLogger("actserve")

LogFormat = Literal["human", "json"]
# Imported before the fork, so that the workers share 8 MB: most need them, whatever they serve.
SHARED_MODULES = ("actserve.engine.runtimes.onnx_runtime", "uvicorn.loops.uvloop")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free port.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of worker processes that share the port.", envvar="ACTSERVE_WORKERS")
    ] = 1,
    runtime: Annotated[
        Literal["auto", "onnx", "pt2"],
        typer.Option(
            help="Program to run; auto: the fastest by `actserve tune`, else .pt2, else .onnx.",
            envvar="ACTSERVE_RUNTIME",
        ),
    ] = "auto",
    precision: Annotated[
        Literal["fp32", "any"],
        typer.Option(
            help="any: int8 or bfloat16 acts in place of float32 where it was exported and is faster here.",
            envvar="ACTSERVE_PRECISION",
        ),
    ] = "fp32",
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads per inference call. Default: one, or all cores for a slow call while no other runs.",
            envvar="ACTSERVE_THREADS",
        ),
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Policy that answers /act; default: the first by name.")] = None,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead of a port.")] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Also serve the Open Inference Protocol over gRPC on this port. Default: off."
        ),
    ] = None,
    gr00t_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Also serve GR00T's protocol over ZeroMQ on this port. Default: off."),
    ] = None,
    ignore: Annotated[
        str | None,
        typer.Option(help="Names in robots' observations that a policy may lack, comma-separated, such as prompt."),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Serve administration on this port of 127.0.0.1; requires ACTSERVE_ADMIN_TOKEN. Default: off.",
        ),
    ] = None,
    trust: TrustOption = None,
    require_signature: Annotated[
        bool, flag("--require-signature", says="Serve only artifacts that a trusted key signed; requires --trust.")
    ] = False,
    log_format: Annotated[
        LogFormat | None, typer.Option(help="Log lines as text (human) or as JSON objects. Default: human.")
    ] = None,
    access_log: Annotated[
        bool, flag("--access-log", says="Log each request. The fast path of plain /act requests logs none.")
    ] = False,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="File of tokens, from `actserve tokens new`; every client must send one. Default: no authentication.",
            envvar="ACTSERVE_TOKENS",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Record what policies see and do into this folder; requires the extra record. Default: off."),
    ] = None,
    record_except: Annotated[
        list[str] | None, typer.Option(help="Do not record clients with a token of this name; may be repeated.")
    ] = None,
    bundles: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Offer the browser bundles in this folder to everybody: on the page, their policies can act in the "
            "browser. Default: none.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate chain (PEM file).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate (PEM file).")] = None,
    root_path: Annotated[
        str | None, typer.Option(help="Prefix of every path behind a proxy, such as /robots. Default: none.")
    ] = None,
    keep_alive: Annotated[
        float | None, typer.Option(help="Close connections that are idle for so many seconds. Default: 75.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Allow browser pages of this origin (CORS); may be repeated.")
    ] = None,
) -> None:
    """Serve every policy of a store over HTTP."""
    gc.disable()  # imports make no garbage; collecting would take a tenth of the start time
    # The service needs no parallel BLAS, and BLAS threads do not survive the fork of the workers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from actserve.core.settings import PREFIX, Settings
    from actserve.server.app import check
    from actserve.server.processes.address import Address
    from actserve.server.processes.supervisor import Supervisor
    from actserve.server.processes.worker import serve as serve_worker
    from actserve.telemetry import logs

    gc.enable()
    given = {
        "store": store,
        "runtime": runtime,
        "threads": threads,
        "precision": precision,
        "policy": policy,
        "workers": workers,
        "grpc_host": host,
        "grpc_port": grpc_port,
        "gr00t_host": host,
        "gr00t_port": gr00t_port,
        "ignore": ignore,
        "admin_port": admin_port,
        "trust": trust,
        "require_signature": require_signature,
        "log_format": log_format,
        "access_log": access_log,
        "tokens": tokens,
        "record": record,
        "record_except": record_except and ",".join(record_except),
        "bundles": bundles,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "root_path": root_path,
        "keep_alive_s": keep_alive,
        "cors_origins": cors_origin and ",".join(cors_origin),
    }
    named = {PREFIX + name.upper(): str(value) for name, value in given.items() if value}
    settings = Settings.from_environment({**os.environ, **named})  # a wrong value fails here, not in a worker
    protocols = check(settings)
    if settings.tokens is None and not (uds or host in LOOPBACK):
        console().print("[yellow]no authentication is configured[/]: every client may send requests; see --tokens")
    logging.config.dictConfig(logs.configuration(settings.log_format))
    address = Address(host, port, uds)
    for module in SHARED_MODULES:
        with suppress(ImportError):
            importlib.import_module(module)
    with _shared_files(settings) as complete:
        supervisor = Supervisor(address, workers, partial(serve_worker, complete.absolute(), protocols))
        log.info("listening on %s", address)
        code = supervisor.run()
    raise typer.Exit(code)


@contextmanager
def _shared_files(settings: Settings) -> Iterator[Settings]:
    """The settings, completed with the files that all workers share.

    A file that the settings do not name is temporary. A named sessions file must be usable.
    """
    from actserve.server.sessions import SessionLimits, Sessions

    if settings.sessions is not None:
        with Sessions(settings.sessions, SessionLimits(), home=settings.session_home):
            pass
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        temporary = {"sessions": Path(folder) / "sessions.sqlite", "counts": Path(folder) / "counts.sqlite"}
        files = {name: getattr(settings, name) or path for name, path in temporary.items()}
        yield settings.model_copy(update={**files, "shared": Path(folder)})
