"""The parts of policies for any game of the Arcade Learning Environment, as in TorchRL's tutorial."""

from __future__ import annotations

from typing import Any

import torch
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.registration import rom_id_to_name
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical
from torchrl.envs import Compose, GrayScale, GymEnv, StepCounter, ToTensorImage, Transform, TransformedEnv
from torchrl.modules import ConvNet, QValueModule

from actserve.core.environment import Environment, GameAction
from actserve.core.errors import UsageError
from actserve_export.sources.policy_source import PolicySource
from actserve_export.training.transforms import NearestResize


def environment(game: str) -> Environment:
    """`game` (a ROM's name, "pong") as Gymnasium's v5 plays it: frame skip 4, sticky actions, minimal action set."""
    ale = _emulator(game)
    actions = tuple(GameAction(code.name, int(code.value)) for code in ale.getMinimalActionSet())
    return Environment(f"ALE/{rom_id_to_name(game)}-v5", game, "pixels", actions)


def screen(game: str) -> tuple[int, int, int]:
    """The shape of `game`'s RGB screen; the height differs between games."""
    height, width = _emulator(game).getScreenDims()
    return (height, width, 3)


def _emulator(game: str) -> Any:
    ALEInterface.setLoggerMode(LoggerMode.Error)  # no banner in the output
    ale = ALEInterface()
    path = roms.get_rom_path(game)
    if ale.isSupportedROM(path) is None:  # loading it would exit the process
        raise UsageError(f"{game} is for two players; ale-py has its ROM but cannot play it")
    ale.loadROM(path)
    return ale


def preprocessing(*more: Transform) -> Compose:
    """(..., H, W, 3) uint8 -> (..., 1, 84, 84) float32 in 0..1, as in the tutorial; then `more`."""
    return Compose(ToTensorImage(in_keys=["pixels"]), NearestResize(84, 84), GrayScale(in_keys=["pixels"]), *more)


def make_env(environment: Environment) -> TransformedEnv:
    """The training environment; its `pixels` are preprocessed."""
    return TransformedEnv(GymEnv(environment.id, categorical_action_encoding=True), preprocessing(StepCounter()))


def value_network(actions: int) -> nn.Module:
    """The Nature CNN (Mnih et al. 2015), (B, 1, 84, 84) -> (B, actions), with its lazy layers initialised."""
    network = ConvNet.default_atari_dqn(num_actions=actions)
    with torch.no_grad():
        network(torch.zeros(1, 1, 84, 84))
    return network


def greedy(network: nn.Module, actions: int) -> TensorDictSequential:
    """pixels -> action_value, action."""
    values = TensorDictModule(network, in_keys=["pixels"], out_keys=["action_value"])
    return TensorDictSequential(values, QValueModule(spec=Categorical(actions)))


def source(game: str) -> PolicySource:
    """The policy that `actserve train` makes for `game`, for raw screens. A checkpoint fills its weights."""
    world = environment(game)
    network = value_network(len(world.actions)).requires_grad_(False)
    return PolicySource(
        policy=TensorDictSequential(preprocessing(), greedy(network, len(world.actions))),
        example=TensorDict({"pixels": torch.zeros(screen(game), dtype=torch.uint8)}),
        outputs=("action", "action_value"),
        observe=lambda count: observe(world, network, count),
        environment=world,
        weights=network,
    )


def observe(world: Environment, network: nn.Module, count: int, games: int = 4) -> TensorDict:
    """`count` real screens, (count, H, W, 3) uint8, from several seeded games, half of the actions random.

    It takes at most every third screen, to cover more of a game, and no screen twice, because the games of a weak
    policy look alike. The same count gives the same screens.
    """
    ALEInterface.setLoggerMode(LoggerMode.Error)
    policy, resize = greedy(network, len(world.actions)), preprocessing()
    generator = torch.Generator().manual_seed(0)
    screens: dict[bytes, torch.Tensor] = {}
    for seed in range(games):
        game = GymEnv(world.id, categorical_action_encoding=True)
        game.set_seed(seed)
        state = game.reset()
        wanted = (count * (seed + 1)) // games
        step = 0
        while len(screens) < wanted:
            if step % 3 == 0:
                screens.setdefault(state["pixels"].numpy().tobytes(), state["pixels"].clone())
            if torch.rand((), generator=generator) < 0.5:
                state.set("action", torch.randint(len(world.actions), (), generator=generator))
            else:
                with torch.no_grad():
                    state.set("action", policy(resize(state.select("pixels").clone()))["action"])
            state = game.step_mdp(game.step(state))
            if state["done"].any():
                state = game.reset()
            step += 1
        game.close()
    return TensorDict({"pixels": torch.stack(list(screens.values()))}, batch_size=[count])
