"""What people write first: a FastAPI service of ten lines, JSON in and out."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()
session = onnxruntime.InferenceSession(os.environ["PROGRAM"], providers=["CPUExecutionProvider"])
output, *_ = [found.name for found in session.get_outputs()]


class Request(BaseModel):
    observation: list[float]


@app.post("/act")
async def act(request: Request) -> dict[str, int]:
    observation = np.array([request.observation], np.float32)
    (action,) = session.run([output], {"observation": observation})
    return {"action": int(action[0])}


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), loop="uvloop", log_level="warning", access_log=False)
