"""How much faster are the rewritten, int8 and bf16 programs of `pong`? Run: python -m tests.benchmarks.programs

One thread, preprocessing counted, raw screens in. The programs take turns within one process; the times are medians.
Then the actions of all on real screens. bf16 is left out on processors without it. With --checkpoint for other weights
than the ones that ship, --pt2 for the compiled programs in float32 as well, --play to let each play a game.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from actserve.atari.play import play
from actserve.core.environment import Environment, game_of
from actserve.core.signature import Array, Arrays
from actserve.engine import golden
from actserve.engine.runtimes import preflight
from actserve_export.capture import TracedPolicy, capture
from actserve_export.certify.narrow import certify_narrow
from actserve_export.programs import aoti, onnx
from actserve_export.programs.quantize.quantize import AGREEMENT, quantize
from actserve_export.programs.rewrites.narrow import layers_in_bfloat16
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.training import bundled

BATCHES = (1, 4, 8, 16, 32)
ROUNDS = 30
WIDE_LAYERS = 1  # of the bf16 program, as `actserve export pong --precision bf16` finds
Run = Callable[[Arrays], Arrays]


def open_onnx(file: Path) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(names, session.run(names, batch), strict=True))


def open_pt2(file: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(file))

    def run(batch: Arrays) -> Arrays:
        action, values = package(torch.from_numpy(batch["pixels"]))
        return {"action": action.numpy(), "action_value": values.numpy()}

    return run


def race(programs: dict[str, Run], screens: Array) -> dict[str, dict[int, float]]:
    """Median microseconds per screen, by program and batch size."""
    medians: dict[str, dict[int, float]] = {name: {} for name in programs}
    for size in BATCHES:
        batch = {"pixels": np.ascontiguousarray(screens[:size])}
        times: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(ROUNDS + 1):
            for name, run in programs.items():
                for _ in range(max(3, 40 // size)):
                    begun = time.perf_counter()
                    run(batch)
                    if number:  # the first round warms up
                        times[name].append(time.perf_counter() - begun)
        for name in programs:
            medians[name][size] = statistics.median(times[name]) * 1e6 / size
    return medians


def build(captured: TracedPolicy, calibration: Array, folder: Path, pt2: bool) -> tuple[dict[str, Run], list[str], Any]:
    """The programs by name, the first one the tutorial's; the rewrites; what the quantiser says."""
    optimized, applied = optimize(captured.program)
    onnx.convert_program(captured.program, captured.signature, folder / "tutorial.onnx")
    onnx.convert_program(optimized, captured.signature, folder / "rewritten.onnx")
    vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
    program, int8 = next(quantize(folder / "rewritten.onnx", {"pixels": calibration}, full_range=vnni))
    (folder / "int8.onnx").write_bytes(program)
    programs = {f".onnx, {name}": open_onnx(folder / f"{name}.onnx") for name in ("tutorial", "rewritten", "int8")}
    if pt2:
        for name, graph in (("tutorial", captured.program), ("rewritten", optimize(captured.program, "pt2")[0])):
            aoti.compile_program(graph, folder / f"{name}.pt2")
            programs[f".pt2, {name}"] = open_pt2(folder / f"{name}.pt2")
    if set(aoti.BF16_FLAGS) & preflight.this_host().cpu_flags:
        narrow = partial(layers_in_bfloat16, wide=WIDE_LAYERS)
        aoti.compile_program(optimize(captured.program, "pt2", narrow)[0], folder / "bf16.pt2", bf16=True)
        programs[".pt2, bf16"] = open_pt2(folder / "bf16.pt2")
    return programs, applied, int8


def show(medians: dict[str, dict[int, float]], console: Console) -> None:
    first, *_ = medians
    table = Table("µs per screen (ratio)", *(f"batch {size}" for size in BATCHES))
    for name, found in medians.items():
        table.add_row(name, *(f"{found[size]:.0f} ({medians[first][size] / found[size]:.2f}x)" for size in BATCHES))
    console.print(table)


def scores(run: Run, game: Environment, episodes: int) -> list[float]:
    return play(
        lambda _seed: lambda screen: run({"pixels": screen[None]})["action"][0], game, episodes=episodes, seed=0
    ).scores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, help="weights of actserve_export.training.atari.value_network(6)")
    parser.add_argument("--screens", type=int, default=10_000, help="to compare actions on; int8 is calibrated on half")
    parser.add_argument("--recorded", type=Path, help="screens from an .npy file, rather than from games played now")
    parser.add_argument("--play", type=int, default=0, metavar="GAMES", help="let the programs play")
    parser.add_argument("--pt2", action="store_true", help="compile and time the .pt2 programs too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch.export.pt2_archive").setLevel(logging.ERROR)
    source = bundled.policy("pong")
    environment = game_of(source.environment)
    assert source.weights is not None
    assert source.observe is not None
    assert environment is not None
    if arguments.checkpoint:
        source.weights.load_state_dict(load_file(arguments.checkpoint))
    wanted = arguments.screens
    console = Console(stderr=arguments.json)
    with console.status(f"{wanted:,} screens of played games"):
        recorded = np.load(arguments.recorded, mmap_mode="r") if arguments.recorded else None
        screens = np.array(recorded[:wanted]) if recorded is not None else source.observe(wanted)["pixels"].numpy()
    captured = capture(source)
    with tempfile.TemporaryDirectory() as folder, console.status("building"):
        programs, applied, int8 = build(captured, screens[::2], Path(folder), arguments.pt2)
    medians = race(programs, screens)
    original, rewritten = programs[".onnx, tutorial"], programs[".onnx, rewritten"]
    held_out = np.ascontiguousarray(screens[1::2])  # compiled programs do not check strides
    games = (lambda run: scores(run, environment, arguments.play)) if arguments.play else None
    certificates = {
        precision: certify_narrow(
            precision, captured.signature, programs[name], original, {"pixels": held_out}, AGREEMENT, games
        )[0]
        for precision, name in (("int8", ".onnx, int8"), ("bf16", ".pt2, bf16"))
        if name in programs
    }
    certificates["int8"] |= int8
    actions = [golden.in_batches(run, {"pixels": screens}, 8)["action"] for run in (original, rewritten)]
    identical = int((actions[0] == actions[1]).sum())
    if arguments.json:
        results = {"us": medians, "identical": identical, "screens": len(screens), **certificates}
        print(json.dumps(results | {"rewrites": applied}))
        return
    for rewrite in applied:
        console.print(f"  {rewrite}", highlight=False)
    show(medians, console)
    console.print(f"rewritten: the same action on {identical:,} of {len(screens):,} screens", highlight=False)
    for precision, certificate in certificates.items():
        console.print(f"{precision}: {certificate}", highlight=False)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
