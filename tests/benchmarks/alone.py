"""One contender on one core, and this process, which is to load it, on another."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks import machine
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.ground import prepare
from tests.benchmarks.questions import Questions
from tests.benchmarks.server import Server, cores


@contextmanager
def alone(name: str, store: Path, progress: Console) -> Iterator[tuple[Server, Questions, dict[str, Any]]]:
    """Contender `name` with pong of `store`, once it answers; how it is asked; and the machine, JSON-able."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    progress.print("screens and programs")
    (contender,) = (c for c in CONTENDERS if c.name == name)
    ground = prepare(store, [contender.policy])
    questions = contender.way(ground.screens[contender.policy])
    server_core, client_core = cores()
    described = machine.describe(server_core, client_core)
    os.sched_setaffinity(0, {client_core})
    with contender.start(ground.stores[contender.policy], ground.programs[contender.policy], server_core) as server:
        server.first_answer_s(questions)
        yield server, questions, described
