"""RemotePolicy: a policy served elsewhere, called like a local one. Needs neither torch nor FastAPI."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import pydantic
import pydantic_core
import urllib3
from urllib3.connection import HTTPConnection

from app import wire
from app.environment import Environment
from app.errors import ServiceError, ServiceUnreachable, UsageError
from app.signature import Array, Signature

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Description:
    """What a service says of one of its policies."""

    name: str
    version: int
    runtime: str  # "onnx" or "pt2"
    reason: str  # why that runtime
    signature: Signature
    environment: Environment | None  # the game it plays, if it plays one


class RemotePolicy:
    """The policy `policy` (by default the service's default one) of the service at `url`, or at a Unix socket `uds`.

    A context manager over one kept connection, not to be shared between threads. Everything raises
    `ServiceUnreachable` when there is no answer and `ServiceError` when the answer is an error.
    """

    def __init__(self, url: str, policy: str | None = None, uds: str | None = None) -> None:
        self.url = url
        self.uds = uds
        self._wanted = policy
        self._connection: _Connection | None = None
        self._description: Description | None = None

    def __enter__(self) -> Self:
        self._connection = _Connection(self.url, self.uds)
        try:
            self._description = self._describe()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.close()

    def act(self, observation: Array | Mapping[str, Array]) -> Any:
        """The policy's action for one observation (*shape), or the k actions for a batch (k, *shape).

        A single discrete action is an int; anything else an array (*action shape) or (k, *action shape). A policy
        with several observations takes them by name. Raises `InvalidTensor` before anything is sent.
        """
        tensors, batched = self._checked(observation)
        content_type, body = request_body(self.signature, tensors, batched)
        answer = self._exchange("POST", act_path(self.name), body, {"Content-Type": content_type})
        spec = self.signature.action
        try:
            action = answer[spec.name]
            if type(action) is int and not batched:  # the common case: nothing to convert
                return action
            size = len(next(iter(tensors.values())))
            shape = (size, *spec.shape) if batched else spec.shape  # a batch of one is answered as one item
            return np.asarray(action, spec.numpy_dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise _unintelligible(f"{spec.name!r} as {spec}", answer) from error

    @property
    def description(self) -> Description:
        """As the service gave it when this was entered."""
        assert self._description is not None, "to be used in a with block"
        return self._description

    @property
    def name(self) -> str:
        return self.description.name

    @property
    def version(self) -> int:
        return self.description.version

    @property
    def runtime(self) -> str:
        return self.description.runtime

    @property
    def signature(self) -> Signature:
        return self.description.signature

    @property
    def environment(self) -> Environment | None:
        return self.description.environment

    def _checked(self, observation: Array | Mapping[str, Array]) -> tuple[dict[str, Array], bool]:
        """-> ({name: (k, *shape)} as the signature wants it, whether it came as a batch)."""
        specs = {spec.name: spec for spec in self.signature.observations}
        if not isinstance(observation, Mapping):
            if len(specs) > 1:
                raise UsageError(f"{self.name} takes {', '.join(specs)}: give them by name")
            observation = dict.fromkeys(specs, observation)
        batched = any(array.ndim > len(specs[name].shape) for name, array in observation.items() if name in specs)
        # A new leading axis keeps row-major arrays as they are; others are copied here.
        tensors = {n: np.ascontiguousarray(array if batched else array[None]) for n, array in observation.items()}
        self.signature.validate(tensors)
        return tensors, batched

    def _describe(self) -> Description:
        name = self._wanted
        if name is None:
            listed = self._exchange("GET", "/policies")
            name = listed.get("default") if isinstance(listed, dict) else None
            if not isinstance(name, str):
                raise UsageError(f"the service at {self.url} names no default policy; say which")
        answer = self._exchange("GET", f"/policies/{quote(name, safe='')}")
        try:
            manifest = answer["manifest"]
            signature = pydantic.TypeAdapter(Signature).validate_python(manifest["signature"])
            environment = pydantic.TypeAdapter(Environment | None).validate_python(manifest.get("environment"))
            return Description(
                answer["name"], answer["version"], answer["runtime"], answer["reason"], signature, environment
            )
        except (KeyError, TypeError, AttributeError, pydantic.ValidationError) as error:
            raise _unintelligible("a description that this version of the client understands", error) from error

    def _exchange(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """One request -> the JSON of its answer."""
        assert self._connection is not None, "to be used in a with block"
        response = self._connection.exchange(method, path, body, headers or {})
        try:
            document = pydantic_core.from_json(response.data)
        except ValueError:
            document = response.data[:200].decode(errors="replace")
        if response.status == 200:
            if isinstance(document, str):
                raise _unintelligible("JSON", document)
            return document
        error = document.get("error") if isinstance(document, dict) else None
        if not isinstance(error, dict) or not {"code", "message"} <= error.keys():
            raise ServiceError(response.status, "http_error", f"{document}")
        raise ServiceError(response.status, error["code"], error["message"])


def act_path(name: str) -> str:
    return f"/policies/{quote(name, safe='')}/act"


def request_body(signature: Signature, tensors: Mapping[str, Array], batched: bool) -> tuple[str, Any]:
    """Observations {name: (k, *shape)} -> (content type, body): raw bytes of a single tensor, JSON for several."""
    if len(signature.observations) > 1:
        return wire.encode(wire.JSON, tensors, batched)
    (array,) = tensors.values()
    # A view: 100 KB of screen are not copied before they are sent.
    return wire.RAW, array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B")


def _unintelligible(expected: str, got: object) -> ServiceError:
    return ServiceError(200, "unintelligible", f"expected {expected}; got {got}"[:500])


class _Connection:
    """The only place that knows urllib3: one kept-alive connection, opened when first used."""

    def __init__(self, url: str, uds: str | None) -> None:
        self._where = url if uds is None else f"{url} through {uds}"
        try:
            parsed = urllib3.util.parse_url(url)
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise UsageError(f"expected a URL such as http://127.0.0.1:8000; got {url!r}")
            self._prefix = (parsed.path or "").rstrip("/")
            self._pool = _pool(url, uds)
        except urllib3.exceptions.HTTPError as error:
            raise UsageError(f"expected a URL such as http://127.0.0.1:8000; got {url!r}: {error}") from error
        self._used = False

    def exchange(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        try:
            try:
                response = self._send(method, path, body, headers)
            except urllib3.exceptions.ProtocolError as error:
                # The service closed the kept connection just as it was used again. What was asked has no state: once
                # more, on a new connection.
                if not self._used or not isinstance(error.args[-1], ConnectionError):
                    raise
                response = self._send(method, path, body, headers)
        except urllib3.exceptions.HTTPError as error:
            raise ServiceUnreachable(f"no answer from {self._where}: {error}", url=self._where) from error
        self._used = True
        return response

    def close(self) -> None:
        self._pool.close()

    def _send(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        return self._pool.urlopen(method, self._prefix + path, body, headers, retries=False, redirect=False)


def _pool(url: str, uds: str | None) -> urllib3.HTTPConnectionPool:
    timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=ANSWER_TIMEOUT_S)
    if uds is not None:
        return _UnixPool("localhost", timeout=timeout, maxsize=1, block=True, uds=uds)
    return urllib3.connection_from_url(url, timeout=timeout, maxsize=1, block=True)


class _UnixConnection(HTTPConnection):
    def __init__(self, *args: Any, uds: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._uds = uds

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            self.sock.connect(self._uds)
        except OSError as error:
            self.close()
            raise urllib3.exceptions.NewConnectionError(self, f"{error}") from error


class _UnixPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _UnixConnection
