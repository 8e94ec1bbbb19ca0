"""`/games`: a policy plays a game on this service, and the page shows it. One WebSocket is one game."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect

from actserve import wire
from actserve.core.errors import ActserveError, InvalidRequest, Unavailable
from actserve.core.settings import Settings
from actserve.engine.policy import Policy
from actserve.engine.runtimes.load import RUNTIMES
from actserve.server.arcade.broadcast import GameBroadcast
from actserve.server.arcade.game import FindPolicy, Game, GameSlots
from actserve.server.http.error_responses import error_json
from actserve.server.http.requests import admission_of, registry_of
from actserve.server.http.websocket import LIMIT
from actserve.server.memory import GAME_BYTES

router = APIRouter(tags=["page"])

_MAX_COMMAND_BYTES = 1024
_REFUSED, _TRY_AGAIN = 1008, 1013


@router.get("/games")
async def games(request: Request) -> dict[str, Any]:
    """Whether this service plays games, the reason if it does not, the maximum and the current number of games."""
    game_slots: GameSlots = request.app.state.game_slots
    why = game_slots.why_closed()
    return {"playable": why is None, "reason": why, "most": game_slots.limit, "playing": game_slots.taken}


@router.websocket("/games")
async def play(websocket: WebSocket) -> None:
    """Play a game. The query has `policy`, `version`, `runtime`, `exploration`, `seed` and `acts`, each optional.

    1. The service sends a hello in JSON: the policy, its environment and the options of the game.
    2. It sends pictures as binary messages: the length of a head (uint32, little-endian), the head in JSON, and the
       screen that the policy saw, as a PNG. It skips pictures for slow clients and beyond 60 a second; each head has
       the times of all steps since the last picture.
    3. The client may send a `Command` in JSON at any time.

    With `acts=browser` it sends the picture of every step, and waits for a command with the number of the `step` and
    the action to take in `held`.

    On an error, the service sends `{"error": ...}` as for other routes, and closes the connection.
    """
    await websocket.accept()
    if LIMIT in websocket.scope["extensions"]:
        websocket.scope["extensions"][LIMIT]["set_max_bytes"](_MAX_COMMAND_BYTES)
    try:
        code = await _play(websocket)
        await websocket.close(code)
    except (WebSocketDisconnect, OSError):
        pass  # the client has disconnected


async def _play(websocket: WebSocket) -> int:
    """Play the whole game; returns the close code. Raises `WebSocketDisconnect`."""
    settings: Settings = websocket.app.state.settings
    game_slots: GameSlots = websocket.app.state.game_slots
    query = websocket.query_params
    try:
        exploration, seed = wire.read_randomness(query)
        if (acts := query.get("acts", "service")) not in ("service", "browser"):
            raise InvalidRequest(f"expected acts=service or browser; got {acts[:80]!r}")
        browser_acts = acts == "browser"
        if reason := game_slots.why_closed():
            raise InvalidRequest(reason)
        with game_slots.take(), admission_of(websocket).memory.taken(GAME_BYTES):
            async with _policy_finder(websocket, settings) as find:
                seed = secrets.randbelow(1 << 31) if seed is None else seed
                game = Game(find, exploration, seed, admission_of(websocket))
                try:
                    await game.begin()
                    return await GameBroadcast(websocket, game, settings.session_idle_s, browser_acts).run()
                finally:
                    game.close()
    except ActserveError as error:
        await websocket.send_text(error_json(error.code, error.message, error.detail).decode())
        return _TRY_AGAIN if isinstance(error, Unavailable) else _REFUSED


@asynccontextmanager
async def _policy_finder(websocket: WebSocket, settings: Settings) -> AsyncIterator[FindPolicy]:
    """The function that finds the policy for each step.

    With another runtime than the served one, it loads a copy of the policy, for this game alone.
    """
    registry, query = registry_of(websocket), websocket.query_params
    served = await registry.find(query["policy"], query.get("version")) if "policy" in query else await registry.get()
    runtime = query.get("runtime")
    if runtime in (None, served.choice.runtime):
        yield lambda: registry.get(served.name, served.version)  # a game stays with the version that began it
        return
    if runtime not in RUNTIMES:
        raise InvalidRequest(f"expected a runtime of {' or '.join(RUNTIMES)}; got {runtime[:80]!r}")
    copy = await asyncio.to_thread(Policy.load, served.artifact, settings.model_copy(update={"runtime": runtime}))
    copy.start()

    async def find() -> Policy:
        return copy

    try:
        yield find
    finally:
        await copy.close()
