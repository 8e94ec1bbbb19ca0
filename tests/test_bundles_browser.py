"""The bundle for browsers, in a headless Chromium."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from actserve.atari.emulator import AtariGame
from actserve.bundles import bundle as bundles
from actserve.bundles.browser import onnxruntime_web
from actserve.bundles.browser.chromium import served
from actserve.core.completion import draw_noise, step_seed
from actserve.core.errors import CorruptFile, RuntimeFailure, UsageError
from actserve.core.signature import Array, Distribution, Noise, TensorSpec
from actserve.store.artifact import Artifact
from tests.browser import chromium, needs_chromium, visit
from tests.bundled import POLICIES, artifact_of, atari, flip_a_weight, observations, screens, session

pytestmark = needs_chromium

FEW = ("tutorial_lstm", "gaussian_noise", "epsilon_greedy")  # of the policies, in `make test`
LAST_BITS = 3e-7  # libraries round logarithms another way
STEPS = 40
WHOLE_GAME = 30_000  # steps, which no game of these policies takes
# Keeps an episode in the page. `arrays` are [type, base64] of each observation.
ASK = """async ({arrays, begin}) => {
  const {Policy} = await import("./policy.js");
  globalThis.policy ??= await Policy.load();
  if (begin) globalThis.episode = policy.episode(begin);
  const decode = ([kind, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new globalThis[kind](bytes.buffer);
  };
  const found = await episode.step(arrays.map(decode));
  return Object.entries(found).map(([name, value]) => [name, Array.from([value].flat(), (v) =>
    ArrayBuffer.isView(v) ? Array.from(v, Number) : v)]);
}"""
KINDS = {
    "uint8": "Uint8Array", "bool": "Uint8Array", "int64": "BigInt64Array", "int32": "Int32Array",
    "float32": "Float32Array", "float64": "Float64Array",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@contextmanager
def opened(browser: Browser, artifact: Artifact, folder: Path) -> Iterator[Page]:
    """A page with the bundle of an artifact."""
    bundles.write(artifact, "browser", "onnx", folder)
    with served(folder) as (url, _), visit(browser) as visited:
        visited.page.goto(url)
        yield visited.page
        assert visited.complaints == []


def ask(page: Page, arrays: list[Array], begin: dict[str, Any] | None = None) -> dict[str, Any]:
    """One step of an episode in the page. `begin`: of a new one."""
    sent = [[KINDS[array.dtype.name], base64.b64encode(array.tobytes()).decode()] for array in arrays]
    return dict(page.evaluate(ASK, {"arrays": sent, "begin": begin}))


def test_the_page_verifies_the_golden_samples_with_and_without_threads(tmp_path: Path) -> None:
    bundles.write(artifact_of("pong"), "browser", "onnx", tmp_path / "bundle")
    manifest, verified = bundles.verify(tmp_path / "bundle")
    assert manifest.name == "pong"
    assert verified.tools["onnxruntime-web"] == onnxruntime_web.VERSION
    flip_a_weight(tmp_path / "bundle")
    with pytest.raises(
        RuntimeFailure, match=r"not verified in the browser, .*: action.* differs from the golden samples"
    ):
        bundles.verify(tmp_path / "bundle")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.wide) for name in POLICIES]
)
def test_an_episode_is_a_session_of_the_service(name: str, browser: Browser, tmp_path: Path) -> None:
    artifact = artifact_of(name)
    signature = artifact.manifest.signature
    seen = observations(artifact, STEPS)
    with opened(browser, artifact, tmp_path / "bundle") as page:
        for exploration in signature.exploration:
            expected = session(artifact, seen, exploration, seed=7)
            begin: dict[str, Any] | None = {"seed": 7, "exploration": exploration}
            for tensors, outputs in zip(seen, expected, strict=True):
                found = ask(page, list(tensors.values()), begin)
                begin = None
                for spec in signature.outputs:
                    ours = np.reshape(found[spec.name], outputs[spec.name].shape)
                    if spec.numpy_dtype.kind == "f":
                        np.testing.assert_allclose(ours, outputs[spec.name], rtol=2e-5, atol=2e-6)
                    else:
                        np.testing.assert_array_equal(ours, outputs[spec.name])


@pytest.mark.parametrize("most", [250, pytest.param(WHOLE_GAME, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", ["pong", "pong-lstm"])
def test_it_plays_the_games_of_the_service(name: str, most: int, browser: Browser, tmp_path: Path) -> None:
    artifact = artifact_of(name)
    _, expected = screens(artifact, most, seed=3)
    game = AtariGame(atari(artifact), 3)
    with opened(browser, artifact, tmp_path / "bundle") as page:
        actions = []
        for step in range(len(expected)):
            actions.append(ask(page, [game.screen()], None if step else {"seed": 3})["action"][0])
            game.act(actions[-1])
    assert actions == expected
    assert len(set(actions)) > 2
    assert game.over == (most == WHOLE_GAME)


def test_seeds_draw_the_noise_of_the_service(browser: Browser, tmp_path: Path) -> None:
    """Thousands of numbers of each distribution, so that the tails are drawn from, too."""
    kinds = get_args(Distribution)
    noises = tuple(Noise(TensorSpec(kind, "float32", (4000,)), kind) for kind in kinds)
    expected = draw_noise(noises, 2**63 - 1, 2)
    code = """async ([seed, elements, kinds]) => {
      const {draw} = await import("./noise.js");
      const {stepSeed} = await import("./sha256.js");
      const noises = kinds.map((name) => ({spec: {name, elements}, distribution: name}));
      const found = draw(noises, BigInt(seed), 2);
      return [String(stepSeed(BigInt(seed), 9)), ...kinds.map((name) => Array.from(found[name]))];
    }"""
    with opened(browser, artifact_of("gaussian_noise"), tmp_path / "bundle") as page:
        step, *found = page.evaluate(code, [str(2**63 - 1), 4000, kinds])
    assert int(step) == step_seed(2**63 - 1, 9)
    for kind, numbers in zip(kinds, found, strict=True):
        theirs = expected[kind].ravel()
        np.testing.assert_allclose(numbers, theirs, rtol=LAST_BITS, atol=LAST_BITS)
        if kind in ("uniform", "normal"):
            assert (np.array(numbers, np.float32) == theirs).mean() > 0.999


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("policy.act({screen: [1]})", "expected inputs of pixels; got screen"),
        ("policy.act({})", "expected pixels, uint8[210, 160, 3]; got nothing"),
        ("policy.act({pixels: new Uint8Array(5)})", "expected a Uint8Array of a multiple of 100800"),
        ("policy.act({pixels: new Float32Array(100800)})", "got Float32Array of 100800"),
        ("policy.episode().act()", "expected pixels uint8[210, 160, 3]; got 0 arrays"),
        ("policy.episode().act(new Uint8Array(201600))", "expected one item, uint8[210, 160, 3]; got 201600 elements"),
        ("policy.episode({exploration: 'random'}).act(new Uint8Array(100800))", "expected an exploration of determin"),
    ],
)
def test_bad_input_is_refused(call: str, message: str, page_of_pong: Page) -> None:
    code = f"""async () => {{
      const {{BadInput, Policy}} = await import("./policy.js");
      const policy = globalThis.policy ??= await Policy.load();
      try {{ await {call}; }} catch (error) {{ return [error instanceof BadInput, error.message]; }}
    }}"""
    is_bad_input, said = page_of_pong.evaluate(code)
    assert is_bad_input
    assert message in said


@pytest.fixture(scope="module")
def page_of_pong(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(browser, artifact_of("pong"), tmp_path_factory.mktemp("pong") / "bundle") as page:
        yield page


def test_a_library_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package.tgz").write_bytes(b"something else")
    monkeypatch.setenv(onnxruntime_web.VARIABLE, str(tmp_path / "package.tgz"))
    with pytest.raises(CorruptFile, match="expected SHA-512"):
        onnxruntime_web.write(tmp_path / "ort")
    monkeypatch.setenv(onnxruntime_web.VARIABLE, str(tmp_path / "none.tgz"))
    with pytest.raises(UsageError, match=r"to name onnxruntime-web-.*\.tgz"):
        onnxruntime_web.write(tmp_path / "ort")
    monkeypatch.delenv(onnxruntime_web.VARIABLE)
    monkeypatch.setattr(onnxruntime_web, "user_cache_path", lambda _: tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="expected npm, to fetch onnxruntime-web"):
        onnxruntime_web.write(tmp_path / "ort")
    assert not (tmp_path / "ort").exists()
