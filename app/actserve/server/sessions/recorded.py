"""The recording of sessions."""

from __future__ import annotations

from actserve.engine.policy import Policy
from actserve.engine.recorders import Door, Feedback, StepRecorder
from actserve.server.admission import name_of
from actserve.server.sessions.session import Session


def step_recorder(
    policy: Policy, session: Session, number: int, door: Door = "session", previous: Feedback | None = None
) -> StepRecorder | None:
    """The recorder of step `number` of `session`; None: it is not recorded."""
    if policy.recorder is None:
        return None
    episode = policy.recorder.session(session.id, door, name_of(session.holder))
    if episode is None:
        return None
    recorder = episode.step(number)
    recorder.previous = previous
    return recorder


def end_recorded(policy: Policy, session: Session, feedback: Feedback) -> None:
    """Record the feedback on the session's last step."""
    if policy.recorder is not None:
        episode = policy.recorder.session(session.id, "session", name_of(session.holder))
        if episode is not None:
            episode.end(feedback)
