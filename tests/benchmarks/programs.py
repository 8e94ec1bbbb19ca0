"""How much faster are the rewritten and the int8 program of `pong`? Run: python -m tests.benchmarks.programs

ONNX Runtime with one thread, preprocessing counted, raw screens in. The three programs take turns within one process;
the times are medians. Then the actions of all three on real screens. With --checkpoint for other weights than the ones
that ship, --pt2 for the compiled programs as well, --play to let each play a game.
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
from actserve_export.capture import TracedPolicy, capture
from actserve_export.programs import aoti, onnx
from actserve_export.programs.quantize.quantize import certify_int8, quantize
from actserve_export.programs.rewrites.optimize import optimize
from actserve_export.training.pong import pong

BATCHES = (1, 8, 32)
ROUNDS = 30
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
    parser.add_argument("--checkpoint", type=Path, help="weights of actserve_export.training.pong.value_network()")
    parser.add_argument("--screens", type=int, default=10_000, help="to compare actions on; int8 is calibrated on half")
    parser.add_argument("--recorded", type=Path, help="screens from an .npy file, rather than from games played now")
    parser.add_argument("--play", type=int, default=0, metavar="GAMES", help="let original and int8 play")
    parser.add_argument("--pt2", action="store_true", help="compile and time the .pt2 programs too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch.export.pt2_archive").setLevel(logging.ERROR)
    source = pong()
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
    original, rewritten, quantized = list(programs.values())[:3]
    certificate = certify_int8(
        captured.signature,
        quantized,
        original,
        {"pixels": screens[1::2]},
        (lambda run: scores(run, environment, arguments.play)) if arguments.play else None,
    )
    actions = [golden.in_batches(run, {"pixels": screens}, 8)["action"] for run in (original, rewritten)]
    identical = int((actions[0] == actions[1]).sum())
    if arguments.json:
        results = {"us": medians, "identical": identical, "screens": len(screens), "int8": int8 | certificate}
        print(json.dumps(results | {"rewrites": applied}))
        return
    for rewrite in applied:
        console.print(f"  {rewrite}", highlight=False)
    show(medians, console)
    console.print(f"rewritten: the same action on {identical:,} of {len(screens):,} screens", highlight=False)
    console.print(f"int8: {int8 | certificate}", highlight=False)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
