"""The `actserve` command. What a subcommand needs is imported when it runs, so that serving starts fast.

Exit code 0: the job was done; 1: it could not be, and stderr says why; 2: a usage error.
"""

from __future__ import annotations

import json as jsonlib
import logging.config
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from app import __version__
from app.commands.keys import keys, sign
from app.commands.routing import ROUTING
from app.commands.stores import DEFAULT_STORE, Label, SignOption, Store, TrustOption, find, publishing, reading
from app.commands.tokens import tokens
from app.commands.tune import tune, tune_quietly
from app.errors import ActserveError, UntrustedProgram, UsageError
from app.lazy import resolve

cli = typer.Typer(
    name="actserve",
    help="Turn a TorchRL policy into a service, and play through it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
cli.add_typer(keys, name="keys")
cli.add_typer(tokens, name="tokens")
cli.command()(sign)
cli.command()(tune)
for command in ROUTING:
    cli.command()(command)
console = Console(stderr=True)  # progress and messages; stdout is for results

DEFAULT_URL = "http://127.0.0.1:8000"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class RuntimeName(StrEnum):
    AUTO = "auto"
    ONNX = "onnx"
    PT2 = "pt2"


class Protocol(StrEnum):
    MACHADO = "machado"


class Way(StrEnum):
    HTTP = "http"
    SESSION = "session"
    STREAM = "stream"
    OIP = "oip"


class ExplorationName(StrEnum):
    DETERMINISTIC = "deterministic"
    RANDOM = "random"


class Action(StrEnum):
    ARGMAX = "argmax"
    IDENTITY = "identity"


class LogFormat(StrEnum):
    HUMAN = "human"
    JSON = "json"


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


Url = Annotated[str, typer.Option(help="The service.", envvar="ACTSERVE_URL")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
PolicyOption = Annotated[str | None, typer.Option(help="The policy's name; by default the service's default.")]

TokenOption = Annotated[
    str | None,
    typer.Option(envvar="ACTSERVE_TOKEN", help="What the service lets in with. Better set by the variable."),
]


@cli.command()
def train(
    name: Annotated[str, typer.Argument(help="pong, pong-lstm, or any other game of ale-py, such as breakout.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder: checkpoints, history, curve. Default runs/NAME.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Environment steps in all; default as in the recipe.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the run folder's checkpoint.")] = True,
    method: Annotated[
        str | None, typer.Option(help="pong: distill, which made the weights that ship, or dqn, the tutorial's.")
    ] = None,
) -> None:
    """Train a policy with TorchRL; stop it at any time and run it again to go on."""
    checkpoint = _offline("exporters.train:run")(
        name, out=out or Path("runs") / name, total_frames=frames, seed=seed, resume=resume, method=method
    )
    print(checkpoint)


@cli.command()
def export(
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAME|MODULE:FACTORY|FILE",
            help="A bundled policy, your own, a model of Stable-Baselines3 (.zip; opening it runs the Python in it: "
            "only your own), or an .onnx file.",
        ),
    ],
    runtime: Annotated[str, typer.Option(help="Programs to build, comma-separated.")] = "onnx,pt2",
    store: Store = DEFAULT_STORE,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights (safetensors) to load into the policy.")] = None,
    name: Annotated[str | None, typer.Option(help="The artifact's name; by default the factory's or file's.")] = None,
    action: Annotated[Action | None, typer.Option(help="What the output of a plain module or .onnx file is.")] = None,
    native: Annotated[bool, typer.Option("--native", help="Build the .pt2 for this CPU alone.")] = False,
    device: Annotated[Device, typer.Option(help="What the .pt2 is built for.")] = Device.CPU,
    int8: Annotated[bool, typer.Option("--int8", help="Publish NAME-int8 too, with a certificate of its own.")] = False,
    evaluate: Annotated[int, typer.Option(min=0, help="Games to play with each program, for the certificate.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first of these games.")] = 0,
    portable: Annotated[
        bool, typer.Option("--portable", help="Certify everything, publish what runs anywhere: no .pt2.")
    ] = False,
    sign: SignOption = None,
    json: Json = False,
) -> None:
    """Export a policy to .onnx and .pt2, prove that they do what it does, and publish them into the store."""
    runtimes = [part for part in runtime.split(",") if part]
    if int8 and RuntimeName.ONNX not in runtimes:
        raise UsageError("--int8 is made from the .onnx program: add onnx to --runtime")
    if not runtimes or set(runtimes) - {RuntimeName.ONNX, RuntimeName.PT2}:
        raise UsageError(f"--runtime takes onnx, pt2 or onnx,pt2; got {runtime!r}")
    own = publishing(store, sign)
    with _steps("importing torch") as progress:
        default_name, source = _offline("exporters.load:find_source")(target, checkpoint, action and action.value)
        done = _offline("exporters.publish:export")(
            source,
            name or default_name,
            own,
            origin=Path(target).name,
            runtimes=runtimes,
            native=native,
            device=device.value,
            portable=portable,
            evaluate=_evaluation(evaluate, seed) if evaluate else None,
            progress=progress,
        )
        if int8:
            quantise = _offline("exporters.int8:export_int8")
            done = quantise(done.artifact, source, own, _play_in_process, progress)
        tune_quietly(done.artifact, progress)
    manifest = done.artifact.manifest
    if json:
        _print_json(
            {
                "name": manifest.name,
                "version": manifest.version,
                "published": done.published,
                "certificate": manifest.certificate,
            }
        )
        return
    what = "published" if done.published else "already in the store, nothing to do:"
    console.print(f"[bold green]{what} {done.artifact.label}[/]")
    _print_certificate(manifest.certificate)


@cli.command(name="compile")
def compile_(
    label: Label,
    store: Store = DEFAULT_STORE,
    native: Annotated[bool, typer.Option("--native", help="For this CPU alone.")] = False,
    sign: SignOption = None,
    json: Json = False,
) -> None:
    """Build the .pt2 of an artifact for this host, from what the store holds, and publish it as the next version."""
    own = publishing(store, sign)
    with _steps("importing torch") as progress:
        built = _offline("exporters.compile:compile")(find(own, label), own, progress, native)
        tune_quietly(built, progress)
    manifest = built.manifest
    if json:
        _print_json({"name": manifest.name, "version": manifest.version, "certificate": manifest.certificate})
    else:
        console.print(f"[bold green]{built.label} has a .pt2 for this host[/]")


@cli.command()
def doctor(
    name: Annotated[str | None, typer.Argument(help="A policy; by default all of the store's.")] = None,
    store: Store = DEFAULT_STORE,
    trust: TrustOption = None,
    json: Json = False,
) -> None:
    """Say what this host can run, and what it cannot and why."""
    from app.doctor import diagnose, print_diagnosis

    with console.status("looking"):
        diagnosis = diagnose(reading(store, trust), name)
    if json:
        _print_json(diagnosis.as_json())
    else:
        print_diagnosis(diagnosis)


@cli.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")],
    after: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")],
    store: Store = DEFAULT_STORE,
    trust: TrustOption = None,
    json: Json = False,
) -> None:
    """Say what changed between two artifacts: signature, actions on golden samples, speed, size."""
    from app import diff as differ

    found = differ.diff(reading(store, trust), before, after)
    if json:
        _print_json(found.as_json())
    else:
        differ.show(found, Console())


@cli.command()
def inspect(
    label: Label,
    store: Store = DEFAULT_STORE,
    graph: Annotated[bool, typer.Option("--graph", help="Print the exported graph.")] = False,
    json: Json = False,
) -> None:
    """Show an artifact: its signature, programs, environment and certificate."""
    artifact = find(reading(store), label)
    manifest = artifact.manifest
    if graph:
        print(artifact.read("graph.txt").decode())
        return
    if json:
        _print_json(manifest.to_dict())
        return
    print(f"{artifact.label}  created {manifest.created}")
    for title, specs in (("takes", manifest.signature.inputs), ("gives", manifest.signature.outputs)):
        for spec in specs:
            print(f"  {title}  {spec.name}: {spec}")
    print(f"  batch  1 to {manifest.signature.max_batch}")
    for runtime, program in manifest.programs.items():
        print(f"  .{runtime}  {manifest.files[program.file].bytes:,} bytes, requires {program.requires}")
        for rewrite in program.rewrites:
            print(f"      rewritten: {rewrite}")
    if manifest.environment:
        game = manifest.environment
        actions = ", ".join(f"{i}={action.meaning}({action.code})" for i, action in enumerate(game.actions))
        print(f"  plays  {game.id}: frame skip {game.frame_skip}, sticky {game.repeat_action_probability}; {actions}")
    _print_certificate(manifest.certificate)


@cli.command()
def verify(label: Label, store: Store = DEFAULT_STORE, trust: TrustOption = None, json: Json = False) -> None:
    """Hash every file of an artifact and run its golden samples through every program that this host can run."""
    from app import golden
    from app.runtimes import base, preflight

    source = reading(store, trust)
    artifact = find(source, label)
    source.verify(artifact)
    results: dict[str, Any] = {}
    for runtime in artifact.manifest.programs:
        reason = preflight.refusal(runtime, artifact.manifest, preflight.this_host())
        if reason is None:
            try:
                agreement = golden.check(artifact, base.load(runtime, artifact).run)
                results[runtime] = {"ran": True, "holds": agreement.holds, **agreement.summary()}
                continue
            except UntrustedProgram as error:
                reason = error.message
        results[runtime] = {"ran": False, "reason": reason}
    signer = artifact.signer
    if json:
        manifest = artifact.manifest
        _print_json({"name": manifest.name, "version": manifest.version, "signer": signer, "programs": results})
    else:
        print(f"{artifact.label}: {len(artifact.manifest.files)} files are what was published")
        if signer or trust:
            print(f"  signed by {signer or 'none of the trusted keys'}")
        for runtime, found in results.items():
            print(f"  .{runtime}: {_verdict(found)}")
    if not all(found.get("holds", True) for found in results.values()):
        raise typer.Exit(1)


@cli.command()
def serve(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port.")] = 1,
    runtime: Annotated[RuntimeName, typer.Option(help="Which program to run.")] = RuntimeName.AUTO,
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
        bool, typer.Option("--require-signature", help="Serve nothing that no trusted key signed.")
    ] = False,
    log_format: Annotated[LogFormat | None, typer.Option(help="Lines for people, or one JSON object each.")] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request on the routes.")] = False,
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
    import uvicorn

    from app import admin, grpc, tls
    from app.access import read
    from app.remote_store import open_store
    from app.settings import PREFIX, Settings
    from app.telemetry import logs
    from app.trust import Trust

    if "://" not in store:
        if not Path(store).is_dir():
            raise UsageError(f"there is no model store at {store}; export a policy first, or name it with --store")
        store = str(Path(store).resolve())
    given = {"store": store, "runtime": runtime.value, **({"policy": policy} if policy else {})}
    given |= {"grpc_host": host, **({"grpc_port": str(grpc_port)} if grpc_port else {})}
    given |= {"admin_port": str(admin_port)} if admin_port else {}
    given |= {"trust": str(trust.resolve())} if trust else {}
    given |= {"require_signature": "1"} if require_signature else {}
    given |= {"log_format": log_format.value} if log_format else {}
    given |= {"access_log": "1"} if access_log else {}
    files = {"tokens": tokens, "tls_cert": tls_cert, "tls_key": tls_key}
    given |= {name: str(file.resolve()) for name, file in files.items() if file}
    given |= {"workers": str(workers), **({"cors_origins": ",".join(cors_origin)} if cors_origin else {})}
    # Through the environment, so that workers, which are new processes, read the same settings.
    os.environ.update({PREFIX + name.upper(): value for name, value in given.items()})
    settings = Settings.from_environment(os.environ)  # a wrong value ends here, not in a worker
    open_store(settings.store, Trust.load(settings.trust, settings.require_signature))
    grpc.check(settings)
    admin.check(settings)
    tls.check(settings)
    if settings.tokens:
        read(settings.tokens)
    elif not (uds or host in LOOPBACK):
        console.print("[yellow]whoever can connect may ask:[/] see --tokens")
    log_config = logs.configuration(settings.log_format)
    logging.config.dictConfig(log_config)
    with _sessions_file(settings.sessions, workers), _counts_file(settings.counts, workers):
        uvicorn.run(
            "app.main:create_app",
            factory=True,
            host=host,
            port=port,
            uds=str(uds) if uds else None,
            workers=workers,
            loop="uvloop",
            http="app.lane.protocol:LaneProtocol",
            ws="app.api.websocket:WebSocketProtocol",
            ws_per_message_deflate=False,
            access_log=False,
            log_config=log_config,
            server_header=False,
            headers=[("X-Content-Type-Options", "nosniff")],
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_graceful_shutdown=30,
        )


@cli.command()
def play(
    url: Url = DEFAULT_URL,
    policy: PolicyOption = None,
    game: Annotated[str | None, typer.Option(help="The game; must be the one that the policy was trained for.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="How many games.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first game; the next ones count up.")] = 0,
    video: Annotated[Path | None, typer.Option(help="Write the games to this .mp4 or .gif.")] = None,
    speed: Annotated[int, typer.Option(min=1, help="Film every n-th step only.")] = 1,
    via: Annotated[
        Way, typer.Option(help="Where the state is: carried here, in a session, a stream, an OIP sequence.")
    ] = Way.HTTP,
    exploration: Annotated[
        ExplorationName | None, typer.Option(help="Act as trained or as while training; by default as it can.")
    ] = None,
    protocol: Annotated[
        Protocol | None, typer.Option(help="Evaluate by this protocol: Machado et al. 2018, Agarwal et al. 2021.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="NAME|URL", help="Play the same seeds with this policy, or this service.")
    ] = None,
    token: TokenOption = None,
    json: Json = False,
) -> None:
    """Play Atari games on this machine with a policy served over HTTP."""
    from app.client import commands

    def games(url: str, policy: str | None, video: Path | None) -> Any:
        return commands.play(
            url, policy, console=console, game=game, episodes=episodes, seed=seed, video=video, speed=speed,
            protocol=protocol.value if protocol else None, via=via.value,
            exploration=exploration.value if exploration else None, token=token,
        )  # fmt: skip

    report = games(url, policy, video)
    other = None
    if compare is not None:
        other = games(compare, policy, None) if "://" in compare else games(url, compare, None)
    if json:
        _print_json(commands.report_as_json(report, protocol is not None, other))
    else:
        commands.print_report(report, protocol is not None, other)


@cli.command()
def load(
    url: Url = DEFAULT_URL,
    policy: PolicyOption = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: this many connections.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.1, help="Open loop: this many requests a second.")] = None,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 10.0,
    via: Annotated[
        Way, typer.Option(help="How to ask: single requests, or each connection a session, a stream, an OIP sequence.")
    ] = Way.HTTP,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Load processes; by default as many as it takes.")
    ] = None,
    token: TokenOption = None,
    json: Json = False,
) -> None:
    """Load a service and report rate, latency and errors."""
    from app.client import commands

    if concurrency is not None and rate is not None:
        raise UsageError("--concurrency (closed loop) and --rate (open loop) exclude each other")
    report = commands.load(url, policy, concurrency, rate, duration, processes, console, via.value, token)
    if json:
        _print_json(report.as_json())
    else:
        commands.print_load(report)


@cli.command()
def bench(
    label: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")] = "pong",
    store: Store = DEFAULT_STORE,
    steps: Annotated[int, typer.Option(min=10, help="Game steps for each.")] = 1000,
    json: Json = False,
) -> None:
    """The tutorial's comparison: TorchRL, .pt2 and .onnx drive the same game, in process and through HTTP."""
    from app import bench as benchmark

    rows = benchmark.run(find(reading(store), label), store, steps, console)
    if json:
        _print_json({"label": label, "steps": steps, "rows": [row.as_json() for row in rows]})
        return
    benchmark.print_rows(rows)


@cli.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """Run the command; turn every error that a user can mend into one line on stderr."""
    try:
        cli()
        sys.exit(0)
    except ActserveError as error:
        console.print(f"[bold red]error:[/] {error.message}", soft_wrap=True, highlight=False)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _play_in_process(run: Callable[[Any], Any], environment: Any) -> list[float]:
    """The score of one seeded game with a program's `run`."""
    from app.client.play import play

    def act(screen: Any) -> int:
        (action, *_) = run({environment.screen: screen[None]}).values()
        return int(action[0])

    return play(lambda _seed: act, environment, episodes=1, seed=0).scores


def _evaluation(episodes: int, seed: int) -> Callable[[Any, Callable[[str], None]], dict[str, Any]]:
    from app.evaluate import evaluate

    return lambda artifact, progress: {"evaluation": evaluate(artifact, episodes, seed, progress)}


@contextmanager
def _sessions_file(named: Path | None, workers: int) -> Iterator[None]:
    """Have a file for the sessions that all workers share: the one named, which must be usable, or a temporary one.
    A lone worker makes its own: uvicorn ends it by the signal that it was sent, and nothing here would run again."""
    from app.sessions import Limits, Sessions
    from app.settings import PREFIX

    if named is not None:
        with Sessions(named, Limits()):
            pass
    if named is not None or workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        os.environ[PREFIX + "SESSIONS"] = str(Path(folder) / "sessions.sqlite")
        yield


@contextmanager
def _counts_file(named: Path | None, workers: int) -> Iterator[None]:
    """Have a file in which several workers add up what they counted: the one named, or a temporary one."""
    from app.settings import PREFIX

    if named is not None or workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="actserve-") as folder:
        os.environ[PREFIX + "COUNTS"] = str(Path(folder) / "counts.sqlite")
        yield


@contextmanager
def _steps(first: str) -> Iterator[Callable[[str], None]]:
    """A live line on stderr with the step under way; the steps done stay above it."""
    with console.status(first) as status:

        def progress(step: str) -> None:
            console.print(f"  {step}")
            status.update(step)

        yield progress


def _offline(path: str) -> Callable[..., Any]:
    """A part of `exporters`, which needs torch and torchrl; `app` itself never imports it."""
    try:
        part: Callable[..., Any] = resolve(path)
    except ModuleNotFoundError as error:
        raise UsageError(f'this needs {error.name}; install it with: pip install "actserve[export]"') from error
    return part


def _print_json(document: dict[str, Any]) -> None:
    print(jsonlib.dumps(document))


def _print_certificate(certificate: dict[str, Any]) -> None:
    table = Table(title=f"certificate: {certificate['samples']} samples from the {certificate['samples_from']}")
    for heading in ("program", "compared", "actions that differ", "largest difference"):
        table.add_column(heading)
    for runtime, found in certificate["programs"].items():
        differences = ", ".join(f"{name} {value:.2g}" for name, value in found["largest_difference"].items())
        table.add_row(f".{runtime}", f"{found['compared']:,}", str(found["action_disagreements"]), differences)
    Console().print(table)
    print(f"compared with {certificate['reference']}")
    if "original" in certificate:
        original = certificate["original"]
        print(f"which was compared with {original['name']}: {original['compared']} actions, none differs")
    for runtime, found in certificate.get("evaluation", {}).get("programs", {}).items():
        low, high = found["mean_interval"] or (found["mean"], found["mean"])
        print(
            f".{runtime}: {found['games']} games through HTTP, mean score {found['mean']:+.2f} ({low:+.2f} to "
            f"{high:+.2f}), {found['lowest']:+.0f} to {found['highest']:+.0f}, {found['lost']} lost"
        )
    if "int8" in certificate:
        print(
            f"int8: {certificate['int8']['agreement']:.2%} of the actions are the original's; "
            f"scores {certificate['int8'].get('scores')}"
        )
    if certificate["smallest_margin"] is not None:
        print(f"smallest lead of a chosen action: {certificate['smallest_margin']:.3g}")


def _verdict(found: dict[str, Any]) -> str:
    if not found["ran"]:
        return f"not run here: {found['reason']}"
    if found["holds"]:
        return f"repeats all {found['compared']} golden samples"
    return (
        f"DISAGREES on {len(found['differing'])} of {found['compared']} golden samples; "
        f"beyond tolerance: {', '.join(found['exceeding']) or 'none'}"
    )
