"""Every door to one service: how to send items through each; the answers have one form.

The service has all routes, the fast path, streams and gRPC on a policy of real screens, uint8[210, 160, 3], that is
ε-greedy and deterministic by default.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import urllib3
from backports import zstd
from fastapi import FastAPI
from safetensors.numpy import save
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from websockets.sync.client import connect

from actserve import wire
from actserve.cli.tools.local_service import free_port
from actserve.core.errors import ActserveError
from actserve.core.settings import Settings
from actserve.core.signature import Array
from actserve.engine.recorders import ServiceRecorder
from actserve.server import protocols
from actserve.server.access.tokens import Access, add_token
from actserve.server.admission import Admission
from actserve.server.app import fast_protocols, install
from actserve.server.fastpath.fast_path import FastPath
from actserve.server.http import act, error_responses, policies, security, sessions
from actserve.server.protocols import Service as ProtocolService
from actserve.server.regions import Regions
from actserve.server.sessions import SessionLimits, Sessions
from tests import robot_doors
from tests.clock import Clock
from tests.fastpath_service import NAME, SCREENS, OnePolicy
from tests.oip import in_binary
from tests.oip_grpc import infer
from tests.serving import port_of, serving

SHAPE = SCREENS.observations[0].shape
ITEM_BYTES = SCREENS.observations[0].item_bytes
RATE = 50.0  # a token's, whose bucket is full at first and never filled again: the clock stands still


@dataclass(frozen=True)
class Result:
    """`status` is HTTP's, or gRPC's by name; `text` is what an error says, empty for an action."""

    status: str
    text: str = ""
    actions: tuple[int, ...] = ()


class Service:
    """A running service, and a client's token for it."""

    def __init__(
        self, port: int, settings: Settings, registry: OnePolicy, admission: Admission, token: str | None
    ) -> None:
        self.port, self.registry, self.admission, self.token = port, registry, admission, token
        self.gr00t_port = settings.gr00t_port
        self.routed: list[str] = []  # requests that came to the routes
        self.http = urllib3.HTTPConnectionPool("127.0.0.1", port, maxsize=8, timeout=60, retries=False)
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.grpc = GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{settings.grpc_port}", options))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [(name.lower(), value) for name, value in self.headers.items()]

    def post(self, path: str, body: bytes, content_type: str, **headers: str) -> urllib3.BaseHTTPResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.request(
            "POST", path, body=body, headers={"Content-Type": content_type, **named, **self.headers}
        )

    @property
    def left(self) -> float:
        """The rest of the token's rate."""
        assert self.admission.access is not None
        (token,) = self.admission.access._tokens.values()
        return token._left

    def hold(self) -> threading.Event:
        """Calls of the program wait until the event is set."""
        self.registry.runtime.gate.clear()
        return self.registry.runtime.gate


@contextmanager
def running(
    folder: Path,
    settings: Settings | None = None,
    tokens: bool = False,
    slow: bool = False,
    recorder: ServiceRecorder | None = None,
) -> Iterator[Service]:
    """With `tokens`, one of `RATE` is needed; `slow`: the program runs in a thread."""
    settings = (settings or Settings()).model_copy(update={"grpc_port": free_port(), "gr00t_port": free_port()})
    token, access = None, None
    if tokens:
        token = add_token(folder / "tokens", "robot", rate=RATE)
        access = Access(folder / "tokens", clock=Clock())
    registry, admission = OnePolicy(settings, slow, SCREENS), Admission(settings, access)
    if recorder is not None:
        registry.record(recorder)
    found = protocols.load()
    # Replaced on this one object, which mypy forbids for methods: the policy is there from the start.
    registry.not_ready = lambda: None  # type: ignore[method-assign]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        registry.go_live()
        with ExitStack() as stack:
            file = folder / "sessions.sqlite"
            regions = app.state.regions = Regions(folder / "regions")
            app.state.sessions = stack.enter_context(Sessions(file, SessionLimits(), admission=admission))
            parts = ProtocolService(registry, admission, app.state.sessions, settings, regions)
            resources = fast_protocols(found, parts)
            async with (
                protocols.serving(found, parts),
                FastPath(registry, admission, app.state.sessions, settings, protocols=resources) as fast_path,
            ):
                yield {"fast_path": fast_path}
            await registry.close()

    app = FastAPI(lifespan=lifespan)
    app.state.settings, app.state.registry, app.state.admission = settings, registry, admission

    @app.middleware("http")
    async def remember(request: Any, call_next: Any) -> Any:
        service.routed.append(request.url.path)
        return await call_next(request)

    error_responses.install(app)
    security.install(app, admission, settings)
    for routes in (act, sessions, policies):
        app.include_router(routes.router)
    install(app, found)
    with serving(app) as server:
        service = Service(port_of(server), settings, registry, admission, token)
        try:
            yield service
        finally:
            registry.runtime.gate.set()


def screens(count: int) -> Array:
    """(count, 210, 160, 3); the action for screen i is i % 5."""
    items = np.zeros((count, *SHAPE), np.uint8)
    items[:, 0, 0, 1] = np.arange(count)
    return items


def _answered(response: urllib3.BaseHTTPResponse) -> Result:
    if response.status == 200:
        actions = np.atleast_1d(np.array(response.json()["action"]))
        return Result("200", actions=tuple(map(int, actions)))
    error = response.json()["error"]
    return Result(str(response.status), error if isinstance(error, str) else error["message"])


def _raw(service: Service, items: Array) -> Result:
    return _answered(service.post("/act", items.tobytes(), wire.RAW))


def _raw_on_the_route(service: Service, items: Array) -> Result:
    return _answered(service.post("/act?outputs=action", items.tobytes(), wire.RAW))


def _by_version(service: Service, items: Array) -> Result:
    return _answered(service.post(f"/policies/{NAME}/versions/1/act", items.tobytes(), wire.RAW))


def _zstd(service: Service, items: Array) -> Result:
    return _answered(service.post("/act", zstd.compress(items.tobytes()), wire.RAW, Content_Encoding="zstd"))


def _json(service: Service, items: Array) -> Result:
    shape = items.shape if len(items) > 1 else items.shape[1:]
    data = base64.b64encode(items.tobytes()).decode()
    document = {"pixels": {"dtype": "uint8", "shape": shape, "b64": data}}
    return _answered(service.post("/act", json.dumps(document).encode(), wire.JSON))


def _safetensors(service: Service, items: Array) -> Result:
    return _answered(service.post("/act", save({"pixels": items if len(items) > 1 else items[0]}), wire.SAFETENSORS))


def _oip(service: Service, items: Array) -> Result:
    body, headers = in_binary({"pixels": items})
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    response = service.post(f"/v2/models/{NAME}/infer", body, wire.RAW, **named)
    if response.status != 200:
        return _answered(response)
    return Result("200", actions=tuple(response.json()["outputs"][0]["data"]))


def _grpc(service: Service, items: Array) -> Result:
    try:
        answer = service.grpc.ModelInfer(infer({"pixels": items}, model_name=NAME), metadata=service.metadata)
    except grpc.RpcError as error:
        return Result(error.code().name, error.details())
    return Result("200", actions=tuple(map(int, np.frombuffer(answer.raw_output_contents[0], np.int64))))


def _grpc_stream(service: Service, items: Array) -> Result:
    try:
        requests = iter([infer({"pixels": items}, model_name=NAME)])
        (answer,) = service.grpc.ModelStreamInfer(requests, metadata=service.metadata)
    except grpc.RpcError as error:
        return Result(error.code().name, error.details())
    if answer.error_message:
        return Result("error", answer.error_message)
    actions = np.frombuffer(answer.infer_response.raw_output_contents[0], np.int64)
    return Result("200", actions=tuple(map(int, actions)))


def _session(service: Service, items: Array) -> Result:
    begun = service.post(f"/policies/{NAME}/sessions", b"", wire.JSON)
    if begun.status != 201:
        return _answered(begun)
    session = begun.json()["session"]
    return _answered(service.post(f"/policies/{NAME}/act", items.tobytes(), wire.RAW, X_Session=session))


def _sequence(service: Service, items: Array) -> Result:
    body, headers = in_binary({"pixels": items}, parameters={"sequence_id": 7, "sequence_start": True})
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    response = service.post(f"/v2/models/{NAME}/infer", body, wire.RAW, **named)
    return (
        Result("200", actions=tuple(response.json()["outputs"][0]["data"]))
        if response.status == 200
        else _answered(response)
    )


def _stream(service: Service, message: bytes | str) -> Result:
    url = f"ws://127.0.0.1:{service.port}/stream"
    with connect(url, compression=None, proxy=None, additional_headers=service.headers, max_size=None) as socket:
        json.loads(socket.recv(60))
        socket.send(message)
        answer = socket.recv(60)
    if isinstance(answer, bytes):
        return Result("200", actions=(int(np.frombuffer(answer[16:24], np.int64)[0]),))
    document = json.loads(answer)
    if "error" in document:
        return Result(str(document["status"]), document["error"]["message"])
    return Result("200", actions=(document["action"],))


def _stream_binary(service: Service, items: Array) -> Result:
    return _stream(service, items.tobytes())


def _stream_text(service: Service, items: Array) -> Result:
    data = base64.b64encode(items.tobytes()).decode()
    return _stream(service, json.dumps({"pixels": {"dtype": "uint8", "shape": SHAPE, "b64": data}}))


Door = Callable[[Service, Array], Result]


def _robot(door: Callable[[Service, Array], int | tuple[str, str]]) -> Door:
    """A door of `robot_doors`, which gives an action, or the code and the text of an error."""

    def act(service: Service, items: Array) -> Result:
        given = door(service, items)
        return Result("200", actions=(given,)) if isinstance(given, int) else _told(*given)

    return act


def _told(code: str, text: str) -> Result:
    """An error that says only its code: the status is that of its class, or of the class above."""
    kind = next(kind for kind in _kinds(ActserveError) if kind.code == code)
    status = next(error_responses.STATUS[base] for base in kind.__mro__ if base in error_responses.STATUS)
    return Result(str(status), text)


def _kinds(kind: type[ActserveError]) -> Iterator[type[ActserveError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


BATCHES: dict[str, Door] = {
    "fast path": _raw,
    "route": _raw_on_the_route,
    "version": _by_version,
    "zstd": _zstd,
    "JSON": _json,
    "safetensors": _safetensors,
    "OIP": _oip,
    "gRPC": _grpc,
    "gRPC stream": _grpc_stream,
}
"""Doors that take batches."""
SINGLE: dict[str, Door] = {
    "session": _session,
    "OIP sequence": _sequence,
    "stream": _stream_binary,
    "stream, text": _stream_text,
    "openpi": _robot(robot_doors.openpi),
    "vla-eval": _robot(robot_doors.vla_eval),
    "json-numpy": _robot(robot_doors.json_numpy),
    "GR00T": _robot(robot_doors.gr00t),
}
"""Doors that take one item at a time."""
ALL = BATCHES | SINGLE
REQUESTS = {"session": 2, "gRPC stream": 2, "stream": 2, "stream, text": 2, "openpi": 2, "vla-eval": 2}
"""How many requests one act through a door takes, where it is more than one: to begin, and the step."""
