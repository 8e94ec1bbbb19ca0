"""Helpers of the tests of sessions: a registry in an event loop, and the expected answers of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from actserve.engine.tuning import Tuning
from actserve.server.sessions import Session
from tests.fake_policy import QUICK, Alone, Versions


def alone(session: Session) -> Alone:
    return Alone(session.version, session.seed, session.exploration)


def run(scenario: Callable[[Versions], Awaitable[None]], tuning: Tuning = QUICK) -> None:
    async def main() -> None:
        registry = Versions(tuning)
        registry.publish()
        try:
            await scenario(registry)
        finally:
            await registry.close()

    asyncio.run(main())
