"""`actserve train`, `export`, `compile` and `bench`: the commands that this package adds to `actserve`.

`actserve` finds them through the entry-point group `actserve.commands`. They import torch and TorchRL only when a
command runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actserve.cli.certificate import print_certificate
from actserve.cli.commands.recordings import Folder, open_recording, progress_bar
from actserve.cli.stores import DEFAULT_STORE, Label, SignOption, Store, find, open_for_publishing, open_for_reading
from actserve.cli.terminal import Json, console, flag, print_json, steps
from actserve.core.errors import UsageError
from actserve.core.imports import import_extra

PROGRAMS = ("onnx", "pt2")

commands = typer.Typer(help="Train, export and compile policies, and compare programs.")
record = typer.Typer()  # `actserve` adds its commands to its own group of this name
commands.add_typer(record, name="record")
Action = Literal["argmax", "identity"]
Precision = Literal["fp32", "int8", "bf16"]


@commands.command(rich_help_panel="Make")
def train(
    name: Annotated[str, typer.Argument(help="pong, pong-lstm, or any other game of ale-py, such as breakout.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder: checkpoints, history, curve. Default runs/NAME.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Environment steps in all; default as in the recipe.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    resume: Annotated[bool, flag(says="Go on from the run folder's checkpoint.")] = True,
    method: Annotated[
        str | None,
        typer.Option(help="distill (default); improve, from bundled weights on; or dqn, the tutorial's."),
    ] = None,
    json: Json = False,
) -> None:
    """Train a policy with TorchRL; stop it at any time and run it again to go on."""
    checkpoint = import_extra("export", "actserve_export.training.train:train")(
        name, out=out or Path("runs") / name, total_frames=frames, seed=seed, resume=resume, method=method
    )
    if json:
        print_json({"checkpoint": str(checkpoint)})
    else:
        print(checkpoint)


@commands.command(rich_help_panel="Make")
def export(
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAME|MODULE:FACTORY|FILE",
            help="A bundled policy, your own, a model of Stable-Baselines3 (.zip; opening it runs the Python in it, so "
            "export only your own), or an .onnx file.",
        ),
    ],
    runtime: Annotated[
        str | None, typer.Option(help="Programs that must be built, comma-separated; by default all that can be.")
    ] = None,
    store: Store = DEFAULT_STORE,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights (safetensors) to load into the policy.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The artifact's name; by default that of the factory or file.")
    ] = None,
    action: Annotated[Action | None, typer.Option(help="What the output of a plain module or .onnx file is.")] = None,
    output: Annotated[
        list[str] | None, typer.Option(help="An output of the .onnx file to keep, the action first. Can be repeated.")
    ] = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="IN=OUT", help="State of the .onnx file: an input, and its next value.")
    ] = None,
    constant: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A setting of the .onnx file, such as is_training=0.")
    ] = None,
    batch_axis: Annotated[
        list[str] | None, typer.Option(metavar="NAME=AXIS", help="Where a tensor of the .onnx file has the batch.")
    ] = None,
    limits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A YAML file of limits that the programs keep to: bounds, change per step, a fallback."
        ),
    ] = None,
    fuzz: Annotated[
        int | None,
        typer.Option(min=1, help="Fuzzed inputs that prove the limits of each program; by default up to 100,000."),
    ] = None,
    native: Annotated[bool, flag("--native", says="Build the .pt2 for this CPU only.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What the .pt2 is built for.")] = "cpu",
    precision: Annotated[
        Precision, typer.Option(help="int8 or bf16: also publish NAME-int8 or NAME-bf16, with its own certificate.")
    ] = "fp32",
    int8: Annotated[bool, flag("--int8", says="Short for --precision int8.")] = False,
    evaluate: Annotated[int, typer.Option(min=0, help="Games to play with each program, for the certificate.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first of these games.")] = 0,
    portable: Annotated[
        bool, flag("--portable", says="Certify all programs, publish only those that run anywhere: no .pt2.")
    ] = False,
    game: Annotated[
        str | None, typer.Option(help="The Atari game that a policy of your own plays, such as pong.")
    ] = None,
    sign: SignOption = None,
    json: Json = False,
) -> None:
    """Export a policy to .onnx and .pt2, prove that they act the same, and publish them into the store."""
    runtimes = None if runtime is None else [part for part in runtime.split(",") if part]
    if int8 and precision == "bf16":
        raise UsageError("expected one of --int8 and --precision bf16; export twice for both")
    narrow = "int8" if int8 else precision
    if narrow == "int8" and runtimes is not None and "onnx" not in runtimes:
        raise UsageError("int8 is made from the .onnx program: add onnx to --runtime")
    if runtimes is not None and (not runtimes or set(runtimes) - set(PROGRAMS)):
        raise UsageError(f"--runtime takes onnx, pt2 or onnx,pt2; got {runtime!r}")
    if fuzz is not None and limits is None:
        raise UsageError("--fuzz is for the limits: add --limits FILE")
    of_file = {
        "outputs": tuple(output or ()),
        "state": _pairs("--state", state, str),
        "constants": _pairs("--constant", constant, _numbers),
        "batch_axes": _pairs("--batch-axis", batch_axis, int),
    }
    import_extra("export", "actserve_export.training.known:locate")(target, checkpoint)  # before torch, which takes 5 s
    kept = None if limits is None else import_extra("export", "actserve_export.sources.limits_file:read_limits")(limits)
    own = open_for_publishing(store, sign)
    from actserve.engine.tuning.tuned import tune_briefly

    with steps("importing torch") as progress:
        with _without_collections():
            publish = import_extra("export", "actserve_export.publish:export")
        default_name, source = import_extra("export", "actserve_export.targets:find_source")(
            target, checkpoint, action, **{name: value for name, value in of_file.items() if value}
        )
        if game is not None:
            source = import_extra("export", "actserve_export.targets:playing")(source, game)
        done = publish(
            source,
            name or default_name,
            own,
            origin=Path(target).name,
            runtimes=runtimes,
            native=native,
            device=device,
            portable=portable,
            evaluate=_evaluation(evaluate, seed) if evaluate else None,
            limits=kept,
            fuzzed=fuzz,
            progress=progress,
        )
        tune_briefly(done.artifact, progress)
        if narrow != "fp32":
            export_narrow = import_extra("export", "actserve_export.narrow:export_narrow")
            done = export_narrow(narrow, done.artifact, source, own, _play_in_process, progress)
            tune_briefly(done.artifact, progress)
    manifest = done.artifact.manifest
    if json:
        print_json(
            {
                "name": manifest.name,
                "version": manifest.version,
                "published": done.published,
                "certificate": manifest.certificate,
            }
        )
        return
    what = "published" if done.published else "already in the store, nothing to do:"
    console().print(f"[bold green]{what} {done.artifact.label}[/]")
    print_certificate(manifest.certificate)


@commands.command("compile", rich_help_panel="Make")
def compile_(
    label: Label,
    store: Store = DEFAULT_STORE,
    native: Annotated[bool, flag("--native", says="For this CPU only.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What the .pt2 is built for.")] = "cpu",
    sign: SignOption = None,
    json: Json = False,
) -> None:
    """Build the .pt2 of a stored artifact for this host, and publish it as the next version."""
    from actserve.engine.tuning.tuned import tune_briefly

    own = open_for_publishing(store, sign)
    with steps("importing torch") as progress:
        compile_program = import_extra("export", "actserve_export.compile:compile")
        built = compile_program(find(own, label), own, progress, native, device)
        tune_briefly(built, progress)
    manifest = built.manifest
    if json:
        print_json({"name": manifest.name, "version": manifest.version, "certificate": manifest.certificate})
    else:
        console().print(f"[bold green]{built.label} has a .pt2 for this host[/]")


@commands.command(rich_help_panel="Play")
def bench(
    label: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")] = "pong",
    store: Store = DEFAULT_STORE,
    steps: Annotated[int, typer.Option(min=10, help="Game steps for each.")] = 1000,
    json: Json = False,
) -> None:
    """The tutorial's comparison: TorchRL, .pt2 and .onnx play the same game, in process and through HTTP."""
    benchmark = import_extra("export", "actserve_export.bench")
    rows = benchmark.run(find(open_for_reading(store), label), store, steps, console())
    if json:
        print_json({"label": label, "steps": steps, "rows": [row.as_json() for row in rows]})
        return
    benchmark.print_rows(rows)


def _play_in_process(run: Callable[[Any], Any], environment: Any) -> list[float]:
    """The score of one seeded game with a program's `run`."""
    from actserve.atari.play import play

    def act(screen: Any) -> int:
        (action, *_) = run({environment.screen: screen[None]}).values()
        return int(action[0])

    return play(lambda _seed: act, environment, episodes=1, seed=0).scores


def _pairs(option: str, given: list[str] | None, kind: Callable[[str], Any]) -> dict[str, Any]:
    """The values of an option of the form NAME=VALUE, by name. Raises `UsageError`."""
    found = {}
    for text in given or ():
        name, _, value = text.rpartition("=")
        try:
            found[name] = kind(value)
        except ValueError:
            name = ""
        if not name or not value:
            raise UsageError(f"{option} takes NAME=VALUE; got {text!r}")
    return found


def _numbers(text: str) -> float | list[float]:
    """`0`, `true`, or `1,0,1` for an array."""
    found = [float({"true": 1, "false": 0}.get(part.strip().lower(), part)) for part in text.split(",")]
    return found if len(found) > 1 else found[0]


@contextmanager
def _without_collections() -> Iterator[None]:
    """For imports, which make no garbage: collecting it takes a fifth of their time. Later collections skip them."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _evaluation(episodes: int, seed: int) -> Callable[[Any, Callable[[str], None]], dict[str, Any]]:
    from actserve.cli.tools.evaluate import evaluate

    return lambda artifact, progress: {"evaluation": evaluate(artifact, episodes, seed, progress)}


FORMATS = {  # module, what it writes, the extra that it needs
    "torchrl": ("torchrl", "transitions", "export"),
    "safetensors": ("as_safetensors", "trajectories", "record"),
    "lerobot": ("as_lerobot", "trajectories", "record"),
    "mcap": ("as_mcap", "trajectories", "mcap"),
}


@record.command("export")
def export_recording(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="Folder to write into; new or empty.")],
    format_: Annotated[
        Literal["torchrl", "safetensors", "lerobot", "mcap"],
        typer.Option(
            "--format",
            help="torchrl: a memory-mapped TensorDict of transitions; safetensors: a file for each trajectory; "
            "lerobot: a dataset of LeRobot; mcap: a file for each trajectory, as viewers of robots' logs open it.",
        ),
    ],
    policy: Annotated[
        str | None, typer.Option(metavar="NAME[@VERSION]", help="Recorded policy; default: the only one.")
    ] = None,
    json: Json = False,
) -> None:
    """Export a recording in the format of another project."""
    recording = open_recording(folder)
    module, what, extra = FORMATS[format_]
    write = import_extra(extra, f"actserve_export.recordings.{module}:write")
    steps = recording.of(*recording.named(policy))
    with progress_bar("exporting", steps.count) as progress:
        count = write(steps, out, progress)
    has_rewards = steps.transitions().mean_return() is not None
    if json:
        done = {"format": format_, "out": str(out), "steps": steps.count, "rewards": has_rewards, what: count}
        print_json(done)
    else:
        print(f"{count:,} {what} of {steps.count:,} steps in {out}" + ("" if has_rewards else "; no reward is known"))
