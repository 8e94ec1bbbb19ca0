"""A server as people write it by hand: FastAPI and uvicorn, a raw body in, JSON out.

With THREADS=1 the inference runs in FastAPI's thread pool; without, in the event loop, which costs a third less here.
"""

from __future__ import annotations

import os

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from tests.benchmarks.peers.program import PORT, load

app = FastAPI()
act = load()


async def directly(request: Request) -> JSONResponse:
    """The loop waits meanwhile: on one core it could do nothing else."""
    return JSONResponse({"action": act([await request.body()])[0]})


async def in_a_thread(request: Request) -> JSONResponse:
    """The loop goes on reading other requests meanwhile."""
    actions = await run_in_threadpool(act, [await request.body()])
    return JSONResponse({"action": actions[0]})


app.post("/act")(in_a_thread if os.environ.get("THREADS") else directly)

if __name__ == "__main__":
    uvicorn.run(app, port=PORT, loop="uvloop", http="httptools", log_level="warning", access_log=False)
