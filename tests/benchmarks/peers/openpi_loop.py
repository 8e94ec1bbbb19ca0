"""openpi's server, rebuilt: one connection after the other is answered in the event loop, one observation a call.

Its published loop receives a msgpack map, calls the policy, and sends a msgpack map with `server_timing`. The policy
here is an `.onnx` program in ONNX Runtime.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection, serve

from tests.benchmarks.peers.program import open_session


def pack_array(value: Any) -> Any:
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def unpack_array(found: dict[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return np.ndarray(found[b"shape"], np.dtype(found[b"dtype"]), found[b"data"])
    return found


def main(program: str, port: int) -> None:
    session = open_session(program)
    names = {entry.name.replace("observation_", "observation/"): entry.name for entry in session.get_inputs()}

    async def handler(websocket: ServerConnection) -> None:
        await websocket.send(msgpack.packb({}))
        async for message in websocket:
            begun_s = time.monotonic()
            observation = msgpack.unpackb(message, object_hook=unpack_array)
            feed = {names[name]: value[None] for name, value in observation.items() if name in names}
            actions = session.run(None, feed)[0][0]
            timing = {"infer_ms": 1000 * (time.monotonic() - begun_s)}
            await websocket.send(msgpack.packb({"actions": actions, "server_timing": timing}, default=pack_array))

    async def forever() -> None:
        async with serve(handler, "127.0.0.1", port, compression=None, max_size=None) as server:
            await server.serve_forever()

    asyncio.run(forever())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
