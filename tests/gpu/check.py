"""The `.pt2` for a GPU: built, certified, measured and served. Run it with tests/gpu/check.sh.

Each part passes, fails, or is skipped with its reason. The exit code is 1 if a part failed: a program that does not
repeat the policy's golden samples, in any way and at any batch size, or a service that answers something else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from actserve.core.errors import one_line
from actserve.core.signature import Array
from actserve.engine import golden
from actserve.engine.runtimes.aoti_package import open_package
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore
from actserve_export.compile import compile as compile_program
from actserve_export.programs.exported import PROGRAM, load_program
from tests.gpu import batches, limits
from tests.shipped import ship

POLICY = "pong"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONNECTIONS = 64
SERVED_S = 5.0
Row = dict[str, Any]
NEEDED_TO_SERVE = (
    *("anyio", "fastapi", "hdrh", "httptools", "opentelemetry", "platformdirs", "prometheus_client", "rich"),
    *("starlette", "typer", "urllib3", "uvicorn", "uvloop", "websockets"),
)
ORT_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Skipped(Exception):
    """A part cannot run here. The message says why."""


class Failed(Exception):
    """A part found something wrong. `found`: its other figures."""

    def __init__(self, reason: str, found: Row | None = None) -> None:
        super().__init__(reason)
        self.found = found or {}


@dataclass
class Check:
    """Runs the parts in the order of `PARTS`. Later parts use the results of earlier ones."""

    device: str
    sizes: tuple[int, ...]
    seconds: float  # of each measurement
    store: ModelStore  # gets the new version
    policy: str  # one with one observation and no state
    folder: Path  # for temporary files
    artifact: Artifact | None = None
    found: dict[str, Any] = field(default_factory=dict)

    def environment(self) -> Row:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Failed("torch sees no CUDA device")
        ort = importlib.util.find_spec("onnxruntime")
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else platform.machine(),
            "onnxruntime": _providers() if ort else "not installed",
        }

    def program(self) -> Row:
        """Builds the `.pt2` and certifies it: `compile` publishes only what repeats the golden samples."""
        policy = self.store.resolve(self.policy)
        self.artifact = compile_program(policy, self.store, print_step, device=self.device)
        requires = self.artifact.manifest.programs["pt2"].requires
        return {
            **{name: requires[name] for name in ("device", "compute_capability")},
            **self.artifact.manifest.certificate["programs"]["pt2"],
        }

    def limits(self) -> Row:
        pinned = self.device == "cuda"
        program = load_program(self._built().read(PROGRAM), self._built().read)
        screens, _ = self._golden()
        frame_bytes, operations = screens[0].nbytes, limits.operations_per_frame(program, torch.from_numpy(screens[:1]))
        copy_rate = limits.copy_rate(self.device, pinned, self.seconds)
        matrix_rate = limits.matrix_rate(self.device, self.seconds)
        launch_s = limits.launch_s(self.device, self.seconds)
        return {
            "bytes a frame": frame_bytes,
            "operations a frame": operations,
            "copy, GB/s": copy_rate / 1e9,
            "copy from pageable memory, GB/s": limits.copy_rate(self.device, False, self.seconds) / 1e9,
            "matrix product, TFLOP/s": matrix_rate / 1e12,
            "frames/s by copying": copy_rate / frame_bytes,
            "frames/s by arithmetic": matrix_rate / operations,
            "shortest call, µs": None if launch_s is None else launch_s * 1e6,
        }

    def frames(self) -> Row:
        """Frames a second by batch size and way; the results of every way are checked."""
        artifact, (screens, expected) = self._built(), self._golden()
        path = self.folder / "policy.pt2"
        path.write_bytes(artifact.read_program("pt2"))
        package = open_package(path, self.device)
        made: dict[str, Callable[[Array], batches.Call]] = {
            batches.SERVICE: lambda part: batches.as_the_service(package, part, self.device)
        }
        for way in batches.ways(self.device):
            made[way.name] = lambda part, way=way: batches.prepared(package, part, self.device, way)  # type: ignore[misc]
        rows = self._measured(made, screens, expected)
        for way in batches.WAYS:
            rows.setdefault(way.name, f"skipped: {self.device} has no pinned memory and no CUDA graphs")
        return rows

    def onnx(self) -> Row:
        """The same with ONNX Runtime's provider for the device."""
        if importlib.util.find_spec("onnxruntime") is None:
            raise Skipped("onnxruntime is not installed")
        provider = ORT_PROVIDERS[self.device]
        if provider not in _providers():
            raise Skipped(f"this onnxruntime has {', '.join(_providers())}; {provider} is in onnxruntime-gpu")
        import onnxruntime

        artifact, (screens, expected) = self._built(), self._golden()
        session = onnxruntime.InferenceSession(artifact.read_program("onnx"), providers=[provider])
        if provider not in session.get_providers():
            raise Failed(f"ONNX Runtime could not load {provider}")
        signature = artifact.manifest.signature
        (observation,), names = signature.inputs, [spec.name for spec in signature.graph_results]
        return self._measured(
            {provider: lambda part: lambda: list(session.run(names, {observation.name: part}))}, screens, expected
        )

    def served(self) -> Row:
        """`actserve serve` with the `.pt2`: sends the golden screens over HTTP, then load."""
        self._built()
        if missing := [name for name in NEEDED_TO_SERVE if importlib.util.find_spec(name) is None]:
            raise Skipped(f"not installed: {', '.join(missing)}; carry their wheels")
        import urllib3

        from actserve.cli.tools import local_service
        from actserve.loadtest.generator import load

        screens, expected = self._golden()
        with local_service.serve(self.store.root, "--runtime", "pt2", ready_within_s=120) as service:
            with urllib3.PoolManager() as http:
                described = http.request("GET", f"{service.url}/policies/{self.policy}").json()
                if described["runtime"] != "pt2":
                    raise Failed(f"the service runs .{described['runtime']}: {described['reason']}")
                answers = [_asked(http, f"{service.url}/policies/{self.policy}/act", screen) for screen in screens]
            if answers != expected[0].tolist():
                raise Failed(f"the service answered {answers}; expected {expected[0].tolist()}")
            report = load(
                service.url, policy=self.policy, concurrency=CONNECTIONS, duration_s=min(SERVED_S, 20 * self.seconds)
            )
        if report.errors:
            raise Failed(f"errors under load: {report.errors}")
        return {"screens": len(screens), "actions/s": report.rate, "p50 ms": report.latency_ms["p50"]}

    def _measured(self, made: dict[str, Callable[[Array], batches.Call]], screens: Array, expected: list[Array]) -> Row:
        """Frames a second, by way and batch size. Raises `Failed` for ways that fail or give a wrong result."""
        manifest = self._built().manifest
        largest, tolerance = manifest.signature.max_batch, manifest.certificate["tolerance"]["absolute"]
        rows: Row = {}
        reasons: list[str] = []
        for name, make in made.items():
            rows[name] = {}
            for size in self.sizes:
                try:
                    one_call = batches.in_pieces(make, batches.tiled(screens, size), largest)
                    wanted = [batches.tiled(array, size) for array in expected]
                    reason = batches.disagreement(one_call(), wanted, tolerance)
                    if reason is None:
                        rows[name][size] = size / batches.seconds_per_call(one_call, self.seconds)
                except Exception as error:  # a way that this torch lacks, or a size that does not fit: the others go on
                    reason = one_line(error)
                if reason is not None:
                    reasons.append(f"{name}, batch {size}: {reason}")
                    break
        if reasons:
            raise Failed("; ".join(reasons), rows)
        return rows

    def _built(self) -> Artifact:
        if self.artifact is None:
            raise Skipped("there is no program")
        return self.artifact

    def _golden(self) -> tuple[Array, list[Array]]:
        """(the screens, the policy's results in the signature's order)."""
        inputs, reference = golden.read(self._built())
        signature = self._built().manifest.signature
        (observation,) = signature.inputs
        return inputs[observation.name], [reference[spec.name] for spec in signature.results]


PARTS = (Check.environment, Check.program, Check.limits, Check.frames, Check.onnx, Check.served)


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _asked(http: Any, url: str, screen: Array) -> int:
    answer = http.request("POST", url, body=screen.tobytes(), headers={"Content-Type": "application/octet-stream"})
    if answer.status != 200:
        raise Failed(f"the service answered {answer.status}: {answer.data[:200]!r}")
    return int(answer.json()["action"])


def run(check: Check, after_each: Callable[[dict[str, Any]], None]) -> bool:
    """Run all parts. True if none failed. `after_each` gets everything found so far."""
    good = True
    for part in PARTS:
        begun = time.perf_counter()
        try:
            outcome, found = "passed", part(check)
        except Skipped as reason:
            outcome, found = "skipped", {"reason": str(reason)}
        except Exception as error:  # also of torch and ONNX Runtime: the other parts go on
            outcome, good = "failed", False
            if isinstance(error, Failed):
                found = {"reason": str(error), **error.found}
            else:
                found = {"reason": one_line(error)}
                traceback.print_exc()
        check.found[part.__name__] = {"outcome": outcome, "seconds": round(time.perf_counter() - begun, 1), **found}
        show(part.__name__, check.found[part.__name__])
        after_each(check.found)
    return good


def show(name: str, found: Row) -> None:
    print(f"\n{name}: {found['outcome']} ({found['seconds']} s)", flush=True)
    tables = {
        key: value
        for key, value in found.items()
        if isinstance(value, dict) and all(isinstance(size, int) for size in value)
    }
    for key, value in found.items():
        if key not in ("outcome", "seconds", *tables):
            print(f"  {key}: {f'{value:,.{0 if value >= 100 else 2}f}' if isinstance(value, float) else value}")
    if tables:
        sizes = max(tables.values(), key=len)
        print(f"  {'frames/s at batch':<26}" + "".join(f"{size:>11}" for size in sizes))
        for key, row in tables.items():
            print(f"  {key:<26}" + "".join(f"{row[size]:>11,.0f}" for size in row))


def print_step(step: str) -> None:
    print(f"  {step}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="batch sizes, comma-separated")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--json", type=Path, help="the file for the figures")
    arguments = parser.parse_args()
    sizes = tuple(int(size) for size in arguments.sizes.split(","))

    def write(found: dict[str, Any]) -> None:
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")

    with tempfile.TemporaryDirectory(prefix="actserve-gpu-") as name:
        folder = Path(name)
        ship(folder / "models_store")
        store = ModelStore(folder / "models_store")
        check = Check(arguments.device, sizes, arguments.seconds, store, POLICY, folder)
        return 0 if run(check, write) else 1


if __name__ == "__main__":
    sys.exit(main())
