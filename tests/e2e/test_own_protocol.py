"""The protocol in `docs/protocols.md`: built from the document, installed in a folder, and played through."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from actserve import RemotePolicy
from actserve.cli.tools import local_service as local
from actserve.server.access.tokens import add_token
from tests.documents import ROOT, blocks
from tests.exported import exported

STEPS = 20
MOST_LINES = 40


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


def connected(url: str, token: str) -> ClientConnection:
    address = url.replace("http", "ws") + "/lines"
    return connect(address, additional_headers={"Authorization": f"Bearer {token}"}, proxy=None)


def test_the_protocol_in_the_document_plays_an_episode(tmp_path: Path) -> None:
    installed = build(tmp_path)
    token = add_token(tmp_path / "tokens", "controller")
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    store = exported("tests.policies:own_state", ["onnx"])
    observations = np.random.default_rng(0).standard_normal((STEPS, 4)).astype(np.float32)
    options = ("--tokens", str(tmp_path / "tokens"))
    with local.serve(store.root, *options, environment={**os.environ, "PYTHONPATH": path}) as service:
        with RemotePolicy(service.url, token=token) as policy:
            episode = policy.episode()
            expected = np.stack([episode.act(observation) for observation in observations])
        with connected(service.url, token) as lines:

            def ask(line: str) -> str:
                lines.send(line)
                return lines.recv(decode=True)

            told = [ask(" ".join(map(str, observation.tolist()))) for observation in observations]
            np.testing.assert_array_equal(np.array([line.split() for line in told], np.float32), expected)
            assert ask("1 2 3").startswith("error: observation: expected float32[4]; got float32[3]")
            assert ask("one two").startswith("error: expected numbers")
            assert len(ask("0 0 0 0").split()) == 4
        with pytest.raises(InvalidStatus, match="401"), connected(service.url, "wrong"):
            pass
