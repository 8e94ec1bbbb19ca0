"""Settings: one frozen record, read from the environment once, in `actserve.server.app`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from actserve.core.errors import UsageError

PREFIX = "ACTSERVE_"


class Settings(BaseModel):
    """Everything that can be set. A field `x` is read from ACTSERVE_X."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[str, BeforeValidator(str)] = Field(
        "models_store", description="The folder of artifacts to serve, or the URL of one, such as `s3://bucket/folder`."
    )
    trust: Path | None = Field(
        None,
        description="A file of public keys, one a line, whose signatures make native code trusted; needs the extra "
        "`sign`. Unset: only native code of a store that is this user's own is.",
    )
    require_signature: bool = Field(False, description="Serve nothing that none of the trusted keys signed.")
    poll_s: float = Field(2.0, gt=0, description="Seconds between two looks at the store for new versions.")
    runtime: Literal["auto", "onnx", "pt2"] = Field(
        "auto",
        description="Which program to run. auto: the fastest here, if `actserve tune` or an export measured "
        "it; else `.pt2` where this host can run it, else `.onnx`.",
    )
    policy: str | None = Field(None, description="The policy behind `/act`. Unset: the first by name.")
    threads: int = Field(1, ge=1, description="Threads inside one inference call.")
    max_body_bytes: int = Field(32 << 20, ge=1, description="The largest request body, in bytes.")
    max_items: int = Field(16_384, ge=1, description="The largest batch that one request may have.")
    max_waiting: int = Field(1024, ge=1, description="Items that may wait for one policy; more are refused with 503.")
    max_wait_ms: float = Field(
        50, gt=0, description="How long a request may have to wait; what comes while it is longer is refused with 503."
    )
    request_timeout_s: float = Field(
        30, ge=1, description="Seconds that a client may take to send a request, or to take its answer."
    )
    sessions: Path | None = Field(
        None,
        description="The file, on a local disk, that holds the sessions; it outlives restarts. "
        "Unset: a temporary one, which `actserve serve` makes for all its workers.",
    )
    session_home: int | None = Field(
        None,
        ge=0,
        lt=1 << 23,
        description="The number of this host, where several hosts each have a `sessions` file. Ray Serve sets it.",
    )
    max_sessions: int = Field(10_000, ge=1, description="Sessions that may be held; the longest idle make room.")
    max_session_bytes: int = Field(
        256 << 20, ge=1, description="What all sessions' state and last answers may come to, in bytes."
    )
    max_sessions_per_token: int = Field(
        1000, ge=1, description="Sessions that the holders of one token may have; its longest idle make room."
    )
    session_idle_s: float = Field(600, gt=0, description="Seconds without a step after which a session is forgotten.")
    counts: Path | None = Field(
        None,
        description="The file, on a local disk, in which worker processes add up what they counted. "
        "Unset: a temporary one, which `actserve serve` makes for all its workers; one alone needs none.",
    )
    log_format: Literal["human", "json"] = Field("human", description="Log lines for people, or one JSON object each.")
    access_log: bool = Field(
        False,
        description="Log each request that comes to the routes; plain `/act` requests, in the fast lane, do not.",
    )
    max_games: int = Field(4, ge=0, description="Games that the page may play at once, for each worker; 0: none.")
    tokens: Path | None = Field(
        None,
        description="A file of tokens (`actserve tokens new`), one of which every request but a probe then needs. "
        "Unset: whoever can connect may ask.",
    )
    tls_cert: Path | None = Field(None, description="The certificate chain, in PEM, for HTTPS and gRPC over TLS.")
    tls_key: Path | None = Field(None, description="Its private key, in PEM; needed with `tls_cert`.")
    public_metrics: bool = Field(False, description="Whether `/metrics` needs no token.")
    cors_origins: str = Field(
        "", description="Origins whose pages may ask from a browser, comma-separated, or `*`. Unset: none but our own."
    )
    max_connections: int = Field(10_000, ge=1, description="Connections that each worker process takes.")
    workers: int = Field(
        1, ge=1, description="Worker processes, each of which grants its share of a rate. `actserve serve` sets it."
    )
    grpc_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port for the Open Inference Protocol over gRPC, which needs the extra `grpc`. Unset: off.",
    )
    grpc_host: str = Field("127.0.0.1", description="Address for gRPC. `actserve serve` sets it to that of HTTP.")
    admin_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of 127.0.0.1 for administration, which needs `admin_token`. Unset: off. Of several workers "
        "one has it, and the others follow.",
    )
    admin_token: str | None = Field(
        None, min_length=16, repr=False, description="What an administrator sends as `Authorization: Bearer`."
    )

    @property
    def origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read ACTSERVE_* variables. Raises `UsageError`, which names the variable and not its value: it may be a
        token."""
        found = {name.removeprefix(PREFIX).lower(): v for name, v in environment.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate({name: value for name, value in found.items() if name in cls.model_fields})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{PREFIX}{str(first['loc'][0]).upper()}: {first['msg']}") from None

    def absolute(self) -> Settings:
        """With paths that mean the same in another folder."""
        paths = {name: value.resolve() for name, value in self if isinstance(value, Path)}
        store = self.store if "://" in self.store else str(Path(self.store).resolve())
        return self.model_copy(update={**paths, "store": store})
