"""The servers that are compared: how to start each, and how to send it requests."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from actserve.cli.tools.local_service import free_port
from actserve.engine.runtimes.host import this_host
from actserve_export.programs.aoti import BF16_FLAGS
from tests.benchmarks.load import Address
from tests.benchmarks.questions import SAFETENSORS, ZSTD, Way, constant, open_inference, posts, several, stream
from tests.benchmarks.server import Server, running

Kind = Literal["floor", "hand", "peer", "ours"]
OWN = Path(sys.prefix)  # where peers that want other versions of what everything else needs have environments
LIBRARIES = str(sysconfig.get_config_var("LIBDIR"))  # with our libpython, which Triton has to find before any other
SCRIPT = "{python} -m tests.benchmarks.peers.{module}"
BENTOML = "{python} -m bentoml serve tests.benchmarks.peers.bentoml:Policy --host 127.0.0.1 --port {port}"
ACTSERVE = "{python} -m actserve serve --runtime onnx --store {store} --port {port}"
ACTSERVE_PT2 = ACTSERVE.replace("onnx", "pt2")


@dataclass(frozen=True)
class Contender:
    name: str  # for --only
    title: str
    kind: Kind  # floor: no inference; hand: what people write themselves; peer: a serving framework; ours: actserve
    command: str
    way: Way
    module: str = ""  # of tests.benchmarks.peers
    batch: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    policy: str = "pong"
    uds: bool = False  # it listens on a Unix socket
    own: bool = False  # it has an environment of its own

    def missing(self) -> str | None:
        """How to install its dependencies, or what this host lacks, if it cannot run."""
        if self.policy == "pong-bf16" and not {*BF16_FLAGS} & this_host().cpu_flags:
            return f"a processor with {' or '.join(BF16_FLAGS)}"
        if self.own:
            return None if self._python.exists() else f"make .venv/{self.module}/installed"
        return None if self.kind != "peer" or find_spec(self.module) else "pip install 'actserve[peers]'"

    def start(self, store: Path, program: Path, *on: int) -> AbstractContextManager[Server]:
        """Its server on these cores with the one policy of `store`, whose .onnx is `program`. Raises `DoesNotServe`."""
        port, socket = free_port(), f"{store}.sock"
        address: Address = socket if self.uds else ("127.0.0.1", port)
        values = {"python": self._python, "module": self.module, "port": port, "store": store, "socket": socket}
        environment = {"PROGRAM": str(program), "PORT": str(port), "BATCH": str(self.batch), **self.environment}
        return running([part.format(**values) for part in self.command.split()], address, on, environment)

    @property
    def _python(self) -> Path:
        return OWN / self.module / "bin" / "python" if self.own else Path(sys.executable)


def peer(
    name: str, title: str, batch: int, way: Way, command: str = SCRIPT, own: bool = False, **env: str
) -> Contender:
    suffix, of = (f"-{batch}", f", batches of {batch}") if batch > 1 else ("", "")
    return Contender(f"{name}{suffix}", f"{title}{of}", "peer", command, way, name, batch, env, own=own)


def ours(name: str, title: str, way: Way, policy: str = "pong") -> Contender:
    return Contender(name, title, "ours", ACTSERVE, way, policy=policy)


CONTENDERS = (
    Contender("uvicorn", "uvicorn alone, no inference", "floor", SCRIPT, constant, module="floor"),
    Contender("fastapi", "FastAPI by hand", "hand", SCRIPT, posts(), module="by_hand"),
    Contender("fastapi-threads", "FastAPI by hand, thread pool", "hand", SCRIPT, posts(), module="by_hand",
              environment={"THREADS": "1"}),
    *(peer("mosec", "mosec", batch, posts("/inference")) for batch in (1, 8, 32)),
    *(peer("litserve", "LitServe", batch, posts("/predict")) for batch in (1, 8)),
    *(peer("bentoml", "BentoML", batch, posts(read=json.loads), BENTOML, own=True) for batch in (1, 8)),
    peer("triton", "Triton (pytriton)", 32, open_inference, own=True, LD_LIBRARY_PATH=LIBRARIES),
    peer("ray", "Ray Serve", 1, posts(), own=True),
    ours("actserve", "actserve", posts()),
    ours("actserve-safetensors", "actserve, safetensors", SAFETENSORS),
    ours("actserve-zstd", "actserve, zstd", ZSTD),
    ours("actserve-stream", "actserve, WebSocket stream", stream),
    Contender("actserve-unix", "actserve, Unix socket", "ours", f"{ACTSERVE} --uds {{socket}}", posts(), uds=True),
    Contender("actserve-8-frames", "actserve, 8 frames a request", "ours", ACTSERVE, several(8),
              environment={"ACTSERVE_MAX_WAIT_MS": "250"}),  # 512 frames at a time are 60 ms of work
    ours("actserve-int8", "actserve, int8", posts(), "pong-int8"),
    Contender("actserve-bf16", "actserve, bf16", "ours", ACTSERVE_PT2, posts(), policy="pong-bf16"),
)  # fmt: skip
