"""The protocol in `docs/protocols.md`: built from the document, installed in a folder, and played through."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from socket import create_connection

import numpy as np

from actserve import RemotePolicy
from actserve.cli.tools import local_service as local
from actserve.server.access.tokens import add_token
from tests.documents import ROOT, blocks
from tests.exported import exported

STEPS = 20
MOST_LINES = 60


def build(folder: Path) -> Path:
    """Do what the document says -> the folder with the installed package."""
    found = list(blocks(ROOT / "docs" / "protocols.md"))
    wire, packaging = next(
        (block, following)
        for block, following in pairwise(found)
        if block.file == "lines_wire.py" and following.language == "bash"
    )
    assert wire.text.count("\n") <= MOST_LINES
    (folder / "lines_wire.py").write_text(wire.text)
    installed = folder / "installed"
    pip = f"{sys.executable} -m pip install --quiet --no-deps --no-build-isolation --target {installed} ."
    assert "\npip install .\n" in packaging.text
    script = packaging.text.replace("\npip install .\n", f"\n{pip}\n")
    subprocess.run(["bash", "-ec", script], cwd=folder, check=True, timeout=300)
    return installed


class Lines:
    def __init__(self, port: int, token: str) -> None:
        self._socket = create_connection(("127.0.0.1", port), timeout=60)
        self._file = self._socket.makefile("rw", encoding="ascii", newline="\n")
        self.say(token)

    def say(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()

    def hear(self) -> str:
        return self._file.readline()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_the_protocol_in_the_document_plays_an_episode(tmp_path: Path) -> None:
    installed = build(tmp_path)
    token, port = add_token(tmp_path / "tokens", "controller"), local.free_port()
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "LINES_PORT": str(port)}
    store = exported("tests.policies:own_state", ["onnx"])
    observations = np.random.default_rng(0).standard_normal((STEPS, 4)).astype(np.float32)
    with local.serve(store.root, "--tokens", str(tmp_path / "tokens"), environment=environment) as service:
        with RemotePolicy(service.url, token=token) as policy:
            episode = policy.episode()
            expected = np.stack([episode.act(observation) for observation in observations])
        lines = Lines(port, token)
        told = [lines.ask(" ".join(map(str, observation.tolist()))) for observation in observations]
        np.testing.assert_array_equal(np.array([line.split() for line in told], np.float32), expected)
        assert lines.ask("1 2 3").startswith("error: observation: expected float32[4]; got float32[3]")
        assert lines.ask("one two").startswith("error: expected numbers")
        assert len(lines.ask("0 0 0 0").split()) == 4
        stranger = Lines(port, "wrong")
        assert stranger.hear().startswith("error: expected a valid token")
        assert stranger.hear() == "", "the connection is closed"
        stranger.close()
    lines.close()
