"""The table of policies that can be exported, made from the results of `tests/e2e/test_kinds.py`.

`python -m tests.kinds` writes it between the marks in docs/bring-your-own-policy.md.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "bring-your-own-policy.md"
FOUND = ROOT / ".cache" / "kinds.json"
BEGIN, END = "<!-- kinds -->", "<!-- /kinds -->"
TITLES = {
    "cart_pair": "Q-values, categorical action",
    "one_hot": "Q-values, one-hot action",
    "several_observations": "several observations: uint8, float32, int64, bool",
    "nested": "nested keys (multi-agent)",
    "deterministic_control": "continuous action",
    "epsilon_greedy": "ε-greedy (`EGreedyModule`)",
    "epsilon_greedy_one_hot": "ε-greedy, one-hot",
    "gaussian_noise": "additive Gaussian noise",
    "ornstein_uhlenbeck": "Ornstein-Uhlenbeck noise (state)",
    "categorical": "`ProbabilisticActor`, Categorical",
    "one_hot_categorical": "`ProbabilisticActor`, OneHotCategorical",
    "masked_categorical": "`ProbabilisticActor`, MaskedCategorical",
    "tanh_normal": "`ProbabilisticActor`, TanhNormal",
    "truncated_normal": "`ProbabilisticActor`, TruncatedNormal",
    "tutorial_lstm": "the tutorial's `recurrent_policy` (2-layer LSTM)",
    "gru": "`GRUModule`",
    "pixel_lstm": "pixels, CNN, `LSTMModule`",
    "cat_frames": "`CatFrames` and `ObservationNorm`",
    "own_state": 'state of your own (`h` → `("next", "h")`)',
}


def record(kind: str, runtime: str, exploration: str, max_batch: int) -> None:
    """Note that a kind was exported, certified, and served singly and batched."""
    FOUND.parent.mkdir(exist_ok=True)
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    found.setdefault(kind, {})[f"{runtime} {exploration}"] = max_batch
    FOUND.write_text(json.dumps(found, indent=1, sort_keys=True))


def table() -> str:
    """Markdown. A cell is the largest batch of one call; "n/a" where the policy has nothing random."""
    found = json.loads(FOUND.read_text())
    columns = [f"{runtime} {mode}" for runtime in ("pt2", "onnx") for mode in ("deterministic", "random")]
    lines = ["| policy | " + " | ".join(f".{column}" for column in columns) + " |", "|---" * 5 + "|"]
    for kind, title in TITLES.items():
        cells = [_cell(found.get(kind, {}), column) for column in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: dict[str, int], column: str) -> str:
    if column in found:
        return f"1 to {found[column]}"
    return "n/a: nothing random" if column.endswith("random") and found else "not run"


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
