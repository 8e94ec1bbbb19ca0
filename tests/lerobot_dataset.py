"""Exports a recording as a dataset of LeRobot, and reads both with pandas, and the dataset with LeRobot's class.

Runs in `.venv/lerobot`:

    python -m tests.lerobot_dataset RECORDING DATASET FRAMES.npz

It writes every feature of all frames into FRAMES.npz, each (T, *shape), and prints what it read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

# torchvision, which LeRobot imports, registers kernels for operators that it has on a GPU only.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
if not hasattr(torch.ops.torchvision, "nms"):
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from actserve.cli.main import main  # noqa: E402


def frames(dataset: Any) -> dict[str, Any]:
    read = [dataset[number] for number in range(len(dataset))]
    tasks = [frame.pop("task") for frame in read]
    return {"task": np.array(tasks), **{name: torch.stack([frame[name] for frame in read]) for name in read[0]}}


if __name__ == "__main__":
    import pandas
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    recording, out, found = sys.argv[1:]
    with patch.object(sys, "argv", ["actserve", "record", "export", recording, out, "--format", "lerobot"]):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
    dataset = LeRobotDataset("actserve/any", root=Path(out))
    np.savez(found, **frames(dataset))
    (shard,), (file,) = Path(recording).glob("*.parquet"), (Path(out) / "data").rglob("*.parquet")
    said = {
        "fps": dataset.fps,
        "features": dataset.features,
        "episodes": dataset.num_episodes,
        "actions": pandas.read_parquet(file)["action"].tolist(),
        "recorded actions": [float(action[0]) for action in pandas.read_parquet(shard)["output.action"]],
    }
    print(json.dumps(said))
