"""Settings of the service. `actserve.server.app` reads them once, from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from actserve.core.errors import UsageError

PREFIX = "ACTSERVE_"


def _without_slash_at_end(path: str) -> str:
    return path.rstrip("/")


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


class Settings(BaseModel):
    """All settings. The environment variable ACTSERVE_X sets the field `x`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[str, BeforeValidator(str)] = Field(
        "models_store", description="The model store to serve: a folder, or a URL such as `s3://bucket/folder`."
    )
    trust: Path | None = Field(
        None,
        description="A file of trusted public keys, one a line; native code that they signed may run. Needs the extra "
        "`sign`. Unset: native code runs only from a store that no other user can change.",
    )
    require_signature: bool = Field(False, description="Serve only artifacts that a trusted key signed.")
    poll_s: float = Field(2.0, gt=0, description="Seconds between polls of the store for new versions.")
    runtime: Literal["auto", "onnx", "pt2"] = Field(
        "auto",
        description="Which program to run. auto: the fastest one, if `actserve tune` or an export measured it on this "
        "host; else `.pt2` if this host can run it, else `.onnx`.",
    )
    precision: Literal["fp32", "any"] = Field(
        "fp32",
        description="`any`: a program in int8 or bfloat16 that was made of the version acts in its place, if it is "
        "faster on this host. Its certificate says how often its actions are the same.",
    )
    policy: str | None = Field(None, description="The policy behind `/act`. Unset: the first by name.")
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads per inference call. Unset: one; a program whose calls are slow takes all cores while no "
        "other slow call of the service runs, if that is faster when it is measured.",
    )
    max_body_bytes: int = Field(32 << 20, ge=1, description="The largest request body, in bytes.")
    max_items: int = Field(16_384, ge=1, description="The largest batch of one request.")
    max_waiting: int = Field(1024, ge=1, description="Length of a policy's queue, in items; more are refused with 503.")
    max_wait_ms: float = Field(
        50, gt=0, description="The longest wait in the queue; while the wait is longer, requests are refused with 503."
    )
    request_timeout_s: float = Field(
        30, ge=1, description="Seconds within which a client must send its request, and receive its answer."
    )
    keep_alive_s: float = Field(
        75,
        gt=0,
        description="Seconds after which an idle connection is closed. It must be longer than the proxy or client in "
        "front keeps idle connections; 60 s is usual.",
    )
    root_path: Annotated[str, AfterValidator(_without_slash_at_end)] = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*/?$",
        description="The prefix of every path behind a proxy, such as `/robots`. The proxy may remove it or leave it.",
    )
    sessions: Path | None = Field(
        None,
        description="The session file, on a local disk; sessions survive restarts. "
        "Unset: a temporary file, which `actserve serve` creates for all its workers.",
    )
    session_home: int | None = Field(
        None,
        ge=0,
        lt=1 << 23,
        description="The number of this host, if several hosts each have a `sessions` file. Ray Serve sets it.",
    )
    max_sessions: int = Field(10_000, ge=1, description="The most sessions; the longest idle ones are evicted.")
    max_session_bytes: int = Field(
        256 << 20, ge=1, description="The most bytes of state and last answers, over all sessions."
    )
    max_sessions_per_token: int = Field(
        1000, ge=1, description="The most sessions of one token; its longest idle ones are evicted."
    )
    session_idle_s: float = Field(600, gt=0, description="Seconds without a step after which a session expires.")
    counts: Path | None = Field(
        None,
        description="The file, on a local disk, in which worker processes sum their counters. Unset: a temporary file, "
        "which `actserve serve` creates for all its workers; a single worker needs none.",
    )
    shared: Path | None = Field(
        None,
        description="A folder that the workers of one service share: the weights of large `.onnx` programs, which all "
        "of them map, and a lock that shows whether another one is busy. `actserve serve` makes a temporary folder.",
    )
    record: Path | None = Field(
        None,
        description="A folder in which the service records what its policies see and do. Needs the extra `record`. "
        "Unset: nothing is recorded.",
    )
    record_except: str = Field("", description="Names of tokens whose steps are not recorded, comma-separated.")
    record_cpu: float = Field(
        0.02,
        gt=0,
        le=1,
        description="The CPU time that recording may take, as a share of one core for each worker. If it is spent, no "
        "further episode is recorded until there is some again.",
    )
    record_buffer_bytes: int = Field(
        64 << 20, ge=1 << 20, description="The most bytes of steps that wait to be written, for each worker."
    )
    log_format: Literal["human", "json"] = Field("human", description="Log lines for people, or as JSON objects.")
    access_log: bool = Field(
        False,
        description="Log each request to the routes. Plain `/act` requests take the fast path and are not logged.",
    )
    bundles: Path | None = Field(
        None,
        description="A folder of browser bundles (`actserve bundle --target browser`). The page can then let their "
        "policies act in the browser. Everybody who can reach the service gets their files, without a token.",
    )
    max_games: int = Field(4, ge=0, description="The most games on the page at once, per worker; 0 turns it off.")
    tokens: Path | None = Field(
        None,
        description="A file of tokens (`actserve tokens new`). Every request except health checks then needs one. "
        "Unset: no authentication.",
    )
    tls_cert: Path | None = Field(None, description="The certificate chain, in PEM, for HTTPS and gRPC over TLS.")
    tls_key: Path | None = Field(None, description="Its private key, in PEM; needed with `tls_cert`.")
    public_metrics: bool = Field(False, description="Whether `/metrics` needs no token.")
    cors_origins: str = Field(
        "", description="Origins whose pages may call from a browser, comma-separated, or `*`. Unset: same origin only."
    )
    max_connections: int = Field(10_000, ge=1, description="The most connections per worker process.")
    max_connection_bytes: int = Field(
        512 << 20,
        ge=1 << 20,
        description="The most bytes of memory that all connections of one worker process hold: idle connections, "
        "bodies, answers that are not read, streams and games. What is beyond is refused with 503.",
    )
    workers: int = Field(
        1, ge=1, description="Worker processes; each grants its share of a rate limit. `actserve serve` sets it."
    )
    grpc_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of the Open Inference Protocol over gRPC. Needs the extra `grpc`. Unset: off.",
    )
    grpc_host: str = Field("127.0.0.1", description="Address for gRPC. `actserve serve` sets it to the HTTP address.")
    gr00t_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of GR00T's protocol over ZeroMQ. Needs the extra `gr00t`. Unset: off.",
    )
    gr00t_host: str = Field("127.0.0.1", description="Address for it. `actserve serve` sets it to the HTTP address.")
    ignore: str = Field(
        "",
        description="Names in robots' observations that a policy may lack, comma-separated, such as `prompt`. Others "
        "are refused.",
    )
    admin_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port on 127.0.0.1 for administration. Needs `admin_token`. Unset: off. Only one of several "
        "workers listens on it, and the others follow its changes.",
    )
    admin_token: str | None = Field(
        None, min_length=16, repr=False, description="The token for administration, sent as `Authorization: Bearer`."
    )

    @property
    def origins(self) -> list[str]:
        return _listed(self.cors_origins)

    @property
    def unrecorded(self) -> list[str]:
        return _listed(self.record_except)

    @property
    def ignored(self) -> list[str]:
        return _listed(self.ignore)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read ACTSERVE_* variables. Raises `UsageError`.

        The error names the variable and not its value, which may be a token.
        """
        found = {name.removeprefix(PREFIX).lower(): v for name, v in environment.items() if name.startswith(PREFIX)}
        try:
            return cls.model_validate({name: value for name, value in found.items() if name in cls.model_fields})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{PREFIX}{str(first['loc'][0]).upper()}: {first['msg']}") from None

    def absolute(self) -> Settings:
        """A copy with absolute paths, which are valid in any current directory."""
        paths = {name: value.resolve() for name, value in self if isinstance(value, Path)}
        store = self.store if "://" in self.store else str(Path(self.store).resolve())
        return self.model_copy(update={**paths, "store": store})
