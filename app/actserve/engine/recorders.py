"""The interface of a recorder: what the engine and the doors tell it. `actserve.recording` implements it.

A door asks the policy's recorder for a `StepRecorder` before a step, and gives it to the batcher with the request. The
batcher calls `capture` with the inputs and outputs. If the step was taken, the door calls `commit`: a step of a session
that another request has taken meanwhile, or a step whose client has cancelled it, is not a part of the episode.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from actserve.core.signature import Arrays
from actserve.store.artifact import Artifact

Door = Literal["act", "session", "sequence", "stream", "robot"]


@dataclass(frozen=True)
class Feedback:
    """The result of a step, which only the client knows. None: it did not say."""

    reward: float | None
    done: bool | None

    def plus(self, later: Feedback | None) -> Feedback:
        """The result of this step and the `later` ones together: the sum of the rewards, and the last `done`."""
        if later is None:
            return self
        rewards = [reward for reward in (self.reward, later.reward) if reward is not None]
        return Feedback(sum(rewards) if rewards else None, self.done if later.done is None else later.done)


class StepRecorder(ABC):
    """One step of an episode, or the items of one stateless request."""

    seed: int | None = None  # of the step's noise; None: nothing is random
    previous: Feedback | None = None  # on the step before

    @abstractmethod
    def capture(self, inputs: Arrays, outputs: Arrays, items: slice, run_ns: int) -> None:
        """Copy the `items` of a batch: the program's inputs and outputs, each (B, *shape).

        The batcher calls it before the client is answered, because then the memory of the observations is used again.
        """

    @abstractmethod
    def commit(self) -> None:
        """Make the captured step a part of its episode. Does nothing if no step was captured, or a second time."""


class EpisodeRecorder(ABC):
    """One episode: a session, a sequence, a stream, or a robot's."""

    @abstractmethod
    def step(self, number: int) -> StepRecorder:
        """The step `number`, counted from 1."""

    @abstractmethod
    def tell(self, feedback: Feedback) -> None:
        """Feedback on the last step, which the next one is recorded with, or the end."""

    @abstractmethod
    def end(self, feedback: Feedback | None = None) -> None:
        """The episode has ended with this feedback on its last step, or with what was told."""


class PolicyRecorder(ABC):
    """The recorder of one version of a policy. `client` is the name of the client's token.

    Every method returns None if nothing is to be recorded.
    """

    @abstractmethod
    def request(self, client: str | None) -> StepRecorder | None:
        """A stateless request. It is committed as soon as it is captured."""

    @abstractmethod
    def episode(self, door: Door, client: str | None) -> EpisodeRecorder | None:
        """An episode that begins, and whose steps this process takes."""

    @abstractmethod
    def session(self, id_: str, door: Door, client: str | None) -> EpisodeRecorder | None:
        """The session with this id, whose steps several processes may take."""


class ServiceRecorder(ABC):
    """The recorder of one worker."""

    @abstractmethod
    def of(self, artifact: Artifact, runtime: str) -> PolicyRecorder:
        """The recorder of a version that the worker has loaded."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """JSON-able, for `GET /policies`: how much it has recorded, and why it has stopped, if it has."""


def committed(recorder: StepRecorder | None) -> None:
    """Commit the step, if it is recorded."""
    if recorder is not None:
        recorder.commit()
