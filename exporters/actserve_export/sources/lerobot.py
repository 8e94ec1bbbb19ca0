"""LeRobot's policies that predict chunks of actions (ACT, Diffusion) -> PolicySource.

A policy of LeRobot keeps a queue of predicted actions, and queues of past observations. Here they are state, for each
item:

    history_NAME   (steps, *shape): the last observations, the first one repeated where an episode begins
    actions        (steps, action): the predicted actions from the next one on, normalised
    actions_left   () int64: how many of them are still to be taken; at 0 the policy predicts new ones
    ensemble       (steps, action), ensemble_count (steps,) int64: with temporal ensembling, instead of the two above
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actserve.core.environment import Contract
from actserve.core.errors import CaptureFailed, UsageError
from actserve.core.robot import Robot
from actserve.core.signature import Chunk
from actserve_export.sources.library_actor import LibraryActor, Tensors, fresh_copy, titled
from actserve_export.sources.policy_source import PolicySource

_KINDS = ("act", "diffusion")
_IMAGES, _ACTION = "observation.images", "action"


def from_lerobot(
    policy: Any,
    preprocessor: Any = None,
    postprocessor: Any = None,
    *,
    channels_last: bool = False,
    whole_chunks: bool = False,
    environment: Contract | None = None,
) -> PolicySource:
    """A policy of LeRobot, acting as `postprocessor(policy.select_action(preprocessor(observation)))` does.

    `policy` is an `ACTPolicy` or a `DiffusionPolicy`, or the folder of a saved one, with its processors.
    `preprocessor` and `postprocessor` are what `make_pre_post_processors` returns; they hold the normalisation. Without
    them the policy takes and returns normalised values.
    `channels_last`: the artifact takes images as cameras give them, uint8 (H, W, C), instead of float32 (C, H, W) in
    0..1.
    `whole_chunks`: the action is the whole predicted chunk, (steps, action), as the signature then says. A client such
    as `Realtime` takes its actions one by one, and the policy runs once a chunk instead of at each step. A policy that
    reads the last observations then takes them all, (steps, *shape).
    Opening a saved policy reads safetensors and JSON only. Raises `CaptureFailed` for another policy, and `UsageError`
    for a folder that cannot be read.
    """
    if isinstance(policy, (str, Path)):
        policy, preprocessor, postprocessor = _read(Path(policy))
    kind = getattr(getattr(policy, "config", None), "type", None)
    if not isinstance(policy, nn.Module) or kind not in _KINDS:
        raise CaptureFailed(
            f"expected a policy of LeRobot of the types {', '.join(_KINDS)}; got a {kind or type(policy).__name__}: "
            "policies that read an instruction, plan, or predict no chunks cannot be exported"
        )
    actor = _ChunkActor(policy, preprocessor, postprocessor, channels_last, whole_chunks)
    call = "predict_action_chunk" if whole_chunks else "select_action"
    period_s = environment.control_period_s if isinstance(environment, Robot) else None
    chunk = Chunk("action", actor.steps, period_s, actor.coefficient) if whole_chunks else None
    return actor.source(titled("LeRobot", "lerobot"), call, environment, chunk=chunk)


def _read(folder: Path) -> tuple[Any, Any, Any]:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no saved policy of LeRobot: it has no config.json")
    try:
        config = PreTrainedConfig.from_pretrained(folder)
        config.device = "cpu"
        policy = get_policy_class(config.type).from_pretrained(folder, config=config)
        return (policy, *make_pre_post_processors(config, pretrained_path=str(folder)))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"{folder.name} is no policy of LeRobot that can be read: {error}") from error


class _ChunkActor(LibraryActor):
    def __init__(
        self, policy: Any, preprocessor: Any, postprocessor: Any, channels_last: bool, whole_chunks: bool
    ) -> None:
        policy.reset()
        model = fresh_copy(policy)
        config = model.config
        self.cameras = list(config.image_features)
        shapes = {name: tuple(feature.shape) for name, feature in config.input_features.items()}
        coefficient = getattr(config, "temporal_ensemble_coeff", None)
        lasting = coefficient is not None
        queues = {} if hasattr(model, "_action_queue") or lasting else model._queues
        images = queues.get(_IMAGES)
        seen = {
            name: torch.zeros((*shape[1:], shape[0]), dtype=torch.uint8)
            if channels_last and name in self.cameras
            else torch.zeros(shape)
            for name, shape in shapes.items()
        }
        width = config.action_feature.shape[0]
        histories = {
            f"history_{name}": torch.zeros(queue.maxlen, *shapes[name])
            for name, queue in queues.items()
            if name in shapes and queue.maxlen > 1
        }
        if whole_chunks:  # the client has the last observations, and this policy runs once a chunk
            lengths = {name: (images if images and name in self.cameras else queues.get(name)) for name in seen}
            seen = {
                name: item.expand(queue.maxlen, *item.shape).clone() if (queue := lengths[name]) is not None else item
                for name, item in seen.items()
            }
            histories = {}
        elif images is not None and images.maxlen > 1:
            size = (len(self.cameras), *shapes[self.cameras[0]])
            histories[f"history_{_IMAGES}"] = torch.zeros(images.maxlen, *size)
        steps = 1 if lasting else (queues[_ACTION] if queues else model._action_queue).maxlen
        chunk: dict[str, Tensor] = {}
        if whole_chunks:
            pass
        elif lasting:
            left = config.chunk_size - 1
            chunk = {"ensemble": torch.zeros(left, width), "ensemble_count": torch.ones(left, dtype=torch.int64)}
        else:
            chunk = {"actions": torch.zeros(steps, width), "actions_left": torch.zeros((), dtype=torch.int64)}
        super().__init__(seen, {**histories, **chunk})
        self.model, self.queues, self.lasting, self.channels_last = model, list(queues), lasting, channels_last
        self.steps, self.coefficient, self.whole_chunks = steps, coefficient, whole_chunks
        self.__dict__["preprocess"], self.__dict__["postprocess"] = preprocessor, postprocessor

    def step(self, seen: Tensors, state: Tensors, begins: Tensor | None, deterministic: bool) -> tuple[Any, ...]:
        batch = self._batch(seen)
        if self.whole_chunks:
            return self._processed(self._planned(batch)), {}
        after = {}
        if self.queues:
            after = {f"history_{name}": self._history(batch[name], name, state, begins) for name in self._observed()}
            self.model._queues = {name: deque(after[f"history_{name}"].unbind(1)) for name in self._observed()}
        try:
            chunk = self.model.predict_action_chunk(batch)
        finally:
            self.model.reset()
        assert begins is not None
        if self.lasting:
            action, left = self._ensembled(chunk, state, begins)
        else:
            fresh = begins | (state["actions_left"] < 1)
            left_before = torch.where(fresh, self.steps, state["actions_left"])
            actions = torch.where(fresh.reshape(-1, 1, 1), chunk[:, : self.steps], state["actions"])
            action = actions[:, 0]
            left = {
                "actions": torch.cat([actions[:, 1:], actions[:, -1:]], 1),
                "actions_left": left_before - 1,
            }
        after |= left
        return self._processed(action), {name: after[name] for name in self.state}

    def _observed(self) -> list[str]:
        return [name for name in self.queues if name != _ACTION]

    def _history(self, latest: Tensor, name: str, state: Tensors, begins: Tensor) -> Tensor:
        """The queue of one observation with `latest`: (B, steps, *shape)."""
        before = state.get(f"history_{name}")
        if before is None:
            return latest.unsqueeze(1)
        repeated = latest.unsqueeze(1).expand(before.shape)
        moved = torch.cat([before[:, 1:], latest.unsqueeze(1)], 1)
        return torch.where(begins.reshape(-1, *[1] * latest.ndim), repeated, moved)

    def _ensembled(self, chunk: Tensor, state: Tensors, begins: Tensor) -> tuple[Tensor, Tensors]:
        """The action, and the running means of the actions after it (Zhao et al. 2023, "Temporal Ensembling").

        A mean of `count` predictions has the weight w_0 + … + w_(count - 1), where w_i = exp(-coefficient i).
        """
        ensembler = self.model.temporal_ensembler
        sums, weights = ensembler.ensemble_weights_cumsum, ensembler.ensemble_weights
        size = ensembler.chunk_size
        count = self._count(state)
        updated = (state["ensemble"] * sums[count - 1] + chunk[:, :-1] * weights[count]) / sums[count]
        updated = torch.where(begins.reshape(-1, 1, 1), chunk[:, :-1], updated)
        count = torch.where(begins.unsqueeze(-1), 1, (count.squeeze(-1) + 1).clamp(max=size))
        means = torch.cat([updated, chunk[:, -1:]], 1)
        counts = torch.cat([count, torch.ones_like(count[:, :1])], 1)
        return means[:, 0], {"ensemble": means[:, 1:], "ensemble_count": counts[:, 1:]}

    def _count(self, state: Tensors) -> Tensor:
        """How many predictions each mean has: (B, steps, 1)."""
        return state["ensemble_count"].clamp(1, self.model.config.chunk_size - 1).unsqueeze(-1)

    def _batch(self, seen: Tensors) -> dict[str, Any]:
        """What the policy's network takes, by name."""
        batch: dict[str, Any] = self._prepared(seen)
        if _IMAGES in self.queues:
            batch[_IMAGES] = torch.stack([batch[name] for name in self.cameras], -4)
        return batch

    def _prepared(self, seen: Tensors) -> dict[str, Any]:
        if self.channels_last:
            seen = {n: x.movedim(-1, -3).float() / 255 if n in self.cameras else x for n, x in seen.items()}
        if self.preprocess is None:
            return dict(seen)
        found = self.preprocess(dict(seen))
        return {name: found[name] for name in seen}

    def _processed(self, action: Tensor) -> Tensor:
        if self.postprocess is None:
            return action
        found: Tensor = self.postprocess(action)
        return found

    def act(self, seen: Tensors, state: Tensors, begins: Tensor | None, noise: list[Tensor]) -> tuple[Tensor, Tensors]:
        """One item, by `select_action`, with the queues as the state has them."""
        model = self.model
        model.reset()
        if self.whole_chunks:
            with _Drawn(noise):
                return self._processed(self._planned(self._batch(seen))), {}
        assert begins is not None
        if not bool(begins):
            left = min(int(state["actions_left"]), self.steps) if not self.lasting else 0
            ahead = [] if self.lasting else list(state["actions"][:, :left].unbind(1))
            for name in self._observed():
                if (history := state.get(f"history_{name}")) is not None:
                    model._queues[name].extend(history.unbind(1))
            if self.lasting:
                model.temporal_ensembler.ensembled_actions = state["ensemble"].clone()
                model.temporal_ensembler.ensembled_actions_count = self._count(state).squeeze(0)
            (model._queues[_ACTION] if self.queues else getattr(model, "_action_queue", deque())).extend(ahead)
        with _Drawn(noise):
            action = self._processed(model.select_action(self._prepared(seen)))
        model.reset()
        return action, {}

    def _planned(self, batch: dict[str, Any]) -> Tensor:
        """The chunk that the policy predicts from the last observations, (B, steps, *shape) each."""
        if self.queues:
            self.model._queues = {name: deque(batch[name].unbind(1)) for name in self._observed()}
        try:
            chunk: Tensor = self.model.predict_action_chunk(batch)
        finally:
            self.model.reset()
        return chunk


class _Drawn(TorchFunctionMode):
    """Makes `torch.randn` return the given numbers, one after the other."""

    def __init__(self, noise: list[Tensor]) -> None:
        super().__init__()
        self._noise = iter(noise)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return next(self._noise)
        return func(*args, **(kwargs or {}))
