"""The blocks of the documents, and a reader who runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import urllib3
from markdown_it import MarkdownIt
from markdown_it.token import Token

from actserve.cli.tools.local_service import free_port
from tests.shipped import ship

ROOT = Path(__file__).parent.parent
RUN = ("bash", "python")
OUTPUT = ("json", "text")  # of the block before, if that was run: see `agrees`
SHOWN = ("js", "nginx", "yaml")
PORTS = ("8000", "8001", "8900")  # as the documents have them: HTTP, gRPC, administration
READY_WITHIN_S = 300.0
BLOCK_WITHIN_S = 1500.0  # a bound for what hangs: compiling takes long where others compile, too

_NOT_RUN = re.compile(r"<!-- not run: (.*) -->")
_FILE = re.compile(r"# ([\w-]+\.py)\n")
_SERVE = re.compile(r"^((?:\w+=\S+ )*actserve serve\b.*)$", re.MULTILINE)
_NUMBER = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason` is why it is not run; None: it is, if it can be."""

    language: str
    text: str
    line: int
    reason: str | None

    @property
    def file(self) -> str | None:
        """The file that it is, by its first line."""
        found = _FILE.match(self.text) if self.language == "python" else None
        return found and found[1]


def tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text())


def blocks(document: Path) -> Iterator[Block]:
    before = ""
    for token in tokens(document):
        if token.type == "fence":
            found = _NOT_RUN.fullmatch(before)
            yield Block(token.info, token.content, (token.map or [0])[0] + 1, found and found[1].strip())
        before = token.content.strip() if token.type == "html_block" else ""


def agrees(block: Block, came: str) -> bool:
    """Whether output is what `block` shows, spaces and lines aside; `…` stands for anything.

    In JSON everything must be the same. In text numbers may differ: times, rates, dates.
    """
    shown = (_plain(part, block.language) for part in block.text.split("…"))
    return re.fullmatch(".*".join(map(re.escape, shown)), _plain(came, block.language), re.DOTALL) is not None


def _plain(text: str, language: str) -> str:
    if language == "text":
        text = re.sub(r"([━─█])\1*", r"\1", _NUMBER.sub("0", text))
    return re.sub(r"\s+", "", text)


class Reader:
    """Has a folder with the store that ships, and one shell whose variables go from block to block.

    A service that a block starts runs until the next one is started, or until the end; ports are free ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {documented: str(free_port()) for documented in PORTS}
        self._service: subprocess.Popen[str] | None = None
        self._variables = folder / ".variables"
        self._begin = f"set -eao pipefail\nsource {self._variables}"
        self._log = folder / ".service.log"
        self._environment = {
            **os.environ,
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "100",
            "ACTSERVE_URL": f"http://127.0.0.1:{self._ports['8000']}",
            "ACTSERVE_MAX_WAIT_MS": "60000",  # that this host is slow is no overload
        }

    def __enter__(self) -> Self:
        ship(self._folder / "models_store")
        (self._folder / ".curlrc").write_text("silent\nshow-error\n")  # as at a terminal
        self._variables.touch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def follow(self, block: Block) -> str:
        """Do what a block says -> everything that it printed. Raises `AssertionError` with that when it fails."""
        text = block.text
        for documented, real in self._ports.items():
            text = re.sub(rf"\b{documented}\b", real, text)
        if block.file is not None:
            (self._folder / block.file).write_text(text)
            return ""
        printed = self._run("python", "-", text=text) if block.language == "python" else self._shell(text)
        for documented, real in self._ports.items():
            printed = printed.replace(real, documented)
        return printed

    def _shell(self, text: str) -> str:
        """A command that serves must be the last line, because a terminal does nothing after it."""
        text, serving, beyond = _SERVE.split(text, maxsplit=1) if _SERVE.search(text) else (text, "", "")
        assert not beyond.strip(), f"nothing comes to pass after what serves: {beyond}"
        printed = self._script(text) if text.strip() else ""
        deadline = time.monotonic() + READY_WITHIN_S
        while '"unknown_policy"' in printed and self._service is not None and time.monotonic() < deadline:
            time.sleep(0.2)  # the service looks for new versions now and then
            printed = self._script(text)
        if serving:
            self._serve(serving.replace("actserve serve", f"exec actserve serve --port {self._ports['8000']}", 1))
        return printed

    def _script(self, text: str) -> str:
        return self._run("bash", "-c", f"{self._begin}\n{text}\nexport -p > {self._variables}")

    def _run(self, *command: str, text: str = "") -> str:
        with subprocess.Popen(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(text, BLOCK_WITHIN_S)
            except BaseException:  # that of the test's bound, too
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == 0, f"exit code {process.returncode}:\n{printed}\n{self._told()}"
        return printed

    def _serve(self, line: str) -> None:
        self._stop()
        with self._log.open("w") as log:
            self._service = subprocess.Popen(
                ["bash", "-c", f"{self._begin}\n{line}"],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                text=True,
            )
        deadline = time.monotonic() + READY_WITHIN_S
        with urllib3.PoolManager(retries=False) as http:
            while self._service.poll() is None and time.monotonic() < deadline:
                try:
                    if http.request("GET", f"{self._environment['ACTSERVE_URL']}/readyz").status == 200:
                        return
                except urllib3.exceptions.HTTPError:
                    pass
                time.sleep(0.02)
        raise AssertionError(f"{line}: {self._told()}")

    def _stop(self) -> None:
        if self._service is not None:
            self._service.terminate()
            self._service.wait(40)
            self._service = None

    def _told(self) -> str:
        return f"the service's log:\n{self._log.read_text()[-3000:]}" if self._log.exists() else ""
