"""The table of policies that can be exported, made from the results of `tests/e2e/test_kinds.py` and `tests/robots`.

`python -m tests.kinds` writes it between the marks in docs/bring-your-own-policy.md.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from tests import policies, policies_agents, policies_heads, policies_models, policies_sb3

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "bring-your-own-policy.md"
FOUND = ROOT / ".cache" / "kinds"  # a file for each cell of the table
LIBRARIES = ("torch", "torchrl", "tensordict", "onnxruntime", "stable-baselines3")
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
    "ppo_tutorial": "the tutorial's PPO policy behind `env.transform`",
    "target_return": "`TimeMaxPool` and `TargetReturn` (state)",
    "act_chunks": "`ACTModel` in `MultiStepActorWrapper` (chunk and counter are state)",
    "diffusion": "`DiffusionActor`",
    "dreamer": "DreamerV3 (`RSSMStateEstimatorV3`, `DreamerV3DiscreteActor`; state)",
    "rbf": "`RBFController`",
    "own_state": 'state of your own (`h` → `("next", "h")`)',
}

FROM_DOCSTRINGS = policies_agents.KINDS | policies_heads.KINDS | policies_models.KINDS
KINDS: dict[str, Callable[[], Any]] = policies.KINDS | FROM_DOCSTRINGS
TITLES |= {name: str(factory.__doc__) for name, factory in FROM_DOCSTRINGS.items()}
# Policies of other libraries; those of the last group are made and recorded in tests/robots/test_kinds.py.
OF_LIBRARIES: dict[str, Callable[[], Any]] = policies_sb3.KINDS
TITLES_OF_LIBRARIES = policies_sb3.TITLES | {
    "rsl_rl_mlp": "rsl_rl: `MLPModel`",
    "rsl_rl_lstm": "rsl_rl: `RNNModel`, 2-layer LSTM (state)",
    "rsl_rl_cnn": "rsl_rl: `CNNModel`",
    "skrl_gaussian": "skrl: Gaussian",
    "skrl_recurrent": "skrl: Gaussian, 2-layer LSTM (state)",
    "skrl_choice": "skrl: Categorical",
    "rl_games_ppo": "rl_games: PPO, 2-layer LSTM (state)",
    "rl_games_sac": "rl_games: SAC",
    "lerobot_act": "LeRobot: ACT (chunks are state)",
    "lerobot_diffusion": "LeRobot: Diffusion (chunks and observations are state)",
    "decision_transformer": "`DTActor` in `DecisionTransformerInferenceWrapper`",
    "online_decision_transformer": "`OnlineDTActor` in `DecisionTransformerInferenceWrapper`",
}

# Why a class of `torchrl.modules` has no row.
_REMOVED = "TorchRL has removed it: it raises when it is made"
_LOSSES = "a part of losses, which no policy runs"
_SEARCH = "a score of a tree search, which needs the environment's model"
_ARGUMENT = "an argument of another class, or a setting of how modules are run"
NO_ROW = {
    **dict.fromkeys(
        ("AdditiveGaussianWrapper", "EGreedyWrapper", "NormalParamWrapper", "OrnsteinUhlenbeckProcessWrapper"), _REMOVED
    ),
    **dict.fromkeys(
        (
            "ComposeValueTransform", "IdentityValueTransform", "PercentileValueNorm", "PopArtValueNorm",
            "RunningValueNorm", "SignedHyperbolicValueTransform", "SymExpTwoHot", "SymLogValueTransform", "ValueNorm",
            "ValueTransform",
        ),
        _LOSSES,
    ),
    **dict.fromkeys(("EXP3Score", "MCTSScore", "MCTSScores", "PUCTScore", "UCB1TunedScore", "UCBScore"), _SEARCH),
    **dict.fromkeys(("CrossCriticGroupSpec", "ReparamGradientStrategy", "set_recurrent_mode"), _ARGUMENT),
    **dict.fromkeys(
        ("DTActor", "DecisionTransformer", "DecisionTransformerInferenceWrapper", "OnlineDTActor"),
        "needs the package transformers: tests/robots/test_transformers.py",
    ),
    **dict.fromkeys(
        ("CEMPlanner", "MPCPlannerBase", "MPPIPlanner"),
        "refused: it plans by stepping an environment, of which a program has none",
    ),
    **dict.fromkeys(("DreamerV3ImageDecoder", "ObsDecoder"), "draws what a model imagines: no policy acts through it"),
    **dict.fromkeys(
        ("GPWorldModel", "RSSMRollout", "RSSMRolloutV3", "WorldModel", "WorldModelWrapper"),
        "a model that is trained, or planned with, over whole trajectories: no policy acts through it",
    ),
    "LMHeadActorValueOperator": "a head of language models of `transformers`, which is not installed",
    "RandomPolicy": "refused: no module, and it reads nothing",
}  # fmt: skip


def record(kind: str, runtime: str, exploration: str, max_batch: int) -> None:
    """Note that a kind was exported, certified, and served singly and batched."""
    (FOUND / kind).mkdir(parents=True, exist_ok=True)
    (FOUND / kind / f"{runtime} {exploration}").write_text(str(max_batch))


def table() -> str:
    """Markdown. A cell is the largest batch of one call; "n/a" where the policy does not act in this way."""
    titles = TITLES | TITLES_OF_LIBRARIES
    folders = {kind: FOUND / kind for kind in titles}
    found = {
        kind: {cell.name: int(cell.read_text()) for cell in folder.iterdir()}
        for kind, folder in folders.items()
        if folder.exists()
    }
    columns = [f"{runtime} {mode}" for runtime in ("pt2", "onnx") for mode in ("deterministic", "random")]
    lines = ["| policy | " + " | ".join(f".{column}" for column in columns) + " |", "|---" * 5 + "|"]
    for kind, title in titles.items():
        cells = [_cell(found.get(kind, {}), column) for column in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name).partition('+')[0]}" for name in LIBRARIES)


def _cell(found: dict[str, int], column: str) -> str:
    if column in found:
        return f"1 to {found[column]}"
    runtime, mode = column.split()
    if not any(cell.startswith(runtime) for cell in found):
        return "not run"
    return "n/a: nothing random" if mode == "random" else "n/a: always random"


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(
        f"{before}{BEGIN}\n{table()}\n\nTested at commit {_commit()}, with {_versions()}.\n{END}{after}"
    )
