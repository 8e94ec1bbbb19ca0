"""A scripted expert for gym-pusht: chooses where to push the T, goes there around it, and pushes.

The block stands still unless it is pushed, and its surface has no friction. So a push at one contact moves it along one
direction in the space of its poses, (x, y, GYRATION * angle). The expert chooses the contact where the error decreases
most for each pixel that the agent moves. Its action depends on nothing but the observation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.benchmarks.pusht import block
from tests.benchmarks.pusht.block import GAP, NORMALS, WAY, Floats

GOAL = np.array([256.0, 256.0, np.pi / 4])  # x, y, angle of the block
LOW, HIGH = 10.0, 501.0  # where the agent can push: 5 pixels from the walls
STRIDE, PUSH = 55.0, 40.0  # how far ahead of the agent its target is at most: on its way, and as it pushes
CHANGE, ANY = 25.0, 10.0  # what a change of contact costs beside the way to it, and any push beside its length: pixels
ASIDE = 6.0  # of a contact: from there the agent can push
CLEAR = 3.0  # less than GAP, where the agent cuts a corner


def error(blocks: Floats) -> Floats:
    """From blocks (n, 3) to the goal: x, y and GYRATION * angle of their centres of gravity, (n, 3)."""
    angle = (GOAL[2] - blocks[:, 2] + np.pi) % (2 * np.pi) - np.pi
    centres = blocks[:, :2] + rotations(blocks[:, 2]) @ block.CENTRE
    return np.column_stack([GOAL[:2] + rotations(GOAL[2:])[0] @ block.CENTRE - centres, block.GYRATION * angle])


def rotations(angles: Floats) -> Floats:
    """From a block's coordinates to the world's: (n,) -> (n, 2, 2)."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def act(observations: Floats) -> tuple[Floats, Any]:
    """For observations (n, 5), agent x, y, block x, y, angle: (the agents' targets (n, 2), their contacts (n,) i64)."""
    agents, blocks = observations[:, :2], observations[:, 2:]
    turns = rotations(blocks[:, 2])
    inside = ((agents - blocks[:, :2])[:, None] @ turns)[:, 0]  # the agents in the blocks' coordinates
    missing = error(blocks)
    missing[:, :2] = (missing[:, None, :2] @ turns)[:, 0]
    places = blocks[:, None, :2] + (block.CONTACTS + block.AGENT * NORMALS) @ turns.transpose(0, 2, 1)
    reachable = ((places > LOW) & (places < HIGH)).all(-1)

    # The agents' distances from the contacts, along the normals and along the edges.
    ahead = ((inside[:, None] - block.CONTACTS) * NORMALS).sum(-1)  # (n, contacts)
    aside = inside[:, None] - block.CONTACTS - ahead[..., None] * NORMALS  # (n, contacts, 2)
    ready = (np.linalg.norm(aside, axis=-1) < ASIDE) & (ahead > 0) & (ahead < GAP + 4)
    reduced, lengths = _worth(missing)
    at, nearest = WAY.nearest(inside)
    around = (block.STANDS_AT - at[:, None]) % WAY.length  # to the stands, in the direction of the way
    way = np.minimum(around, WAY.length - around) + np.linalg.norm(inside - nearest, axis=1)[:, None]
    cost = np.where(ready, 0, way + CHANGE) + lengths + ANY
    best = (reachable * reduced / cost).argmax(1)

    chosen = np.arange(len(best)), best
    through = ahead[chosen] - block.AGENT + 1.1 * lengths[chosen] + 2  # a little farther: the agent slows down early
    far = np.minimum(PUSH, through)
    pushes = inside - NORMALS[best] * far[:, None] - aside[chosen]
    steps = _steps(inside, at, nearest, block.STANDS[best], around[chosen])
    targets = np.where(ready[chosen][:, None], pushes, steps)
    return np.clip(blocks[:, :2] + (turns @ targets[..., None])[..., 0], 0, 512), best


def _worth(missing: Floats) -> tuple[Floats, Floats]:
    """By how much the best push at each contact reduces the error, and how long it is: (n, contacts)."""
    strengths = np.linalg.norm(block.TWISTS, axis=1)
    useful = np.maximum(missing @ block.TWISTS.T / strengths, 0)
    left = np.linalg.norm(missing, axis=1)[:, None]
    return left - np.sqrt(np.maximum(left**2 - useful**2, 0)), useful * strengths


def _steps(inside: Floats, at: Floats, nearest: Floats, stands: Floats, around: Floats) -> Floats:
    """The agents' next targets on their ways to their stands, (n, 2): as far as they get in a straight line.

    `at` and `nearest` say where the agents come to the way, and `around` how far the stands are along it.
    """
    rows = np.arange(len(at))
    forward = (around < WAY.length - around)[:, None]
    length = np.minimum(around, WAY.length - around)[:, None]
    passed = (block.WAYPOINTS_AT - at[:, None]) % WAY.length
    passed = np.where(forward, passed, WAY.length - passed)
    waypoints = np.broadcast_to(block.WAYPOINTS, (len(at), *block.WAYPOINTS.shape))
    places = np.concatenate([waypoints, stands[:, None]], 1)
    shares = np.linspace(0, 1, 9)[1:, None, None, None]
    lines = inside[:, None] + shares * (places - inside[:, None])
    clear = np.minimum(GAP - CLEAR, block.distance(inside) - 0.5)[:, None]
    free = block.distance(lines).min(0) > clear
    passed = np.concatenate([np.where(passed <= length, passed, -1), length], 1)
    reached = np.where(free, passed, -1)
    targets = np.where(reached.max(1, keepdims=True) >= 0, places[rows, reached.argmax(1)], nearest)
    far = np.linalg.norm(targets - inside, axis=1, keepdims=True)
    strides: Floats = inside + (targets - inside) * STRIDE / np.maximum(far, STRIDE)
    return strides
