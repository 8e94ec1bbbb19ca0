"""The T of gym-pusht: its shape, where the agent can push it, and the way around it.

Everything is in the block's own coordinates, in pixels. Their origin is the middle of the bar's upper edge: the block's
position in observations.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

AGENT = 15.0  # radius of the agent
OUTLINE = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], np.float64)
BAR, STEM = np.array([[(0, 15), (60, 15)], [(0, 75), (15, 45)]], np.float64)  # (middle, half of the size)
CENTRE = np.array([0.0, 45.0])  # of gravity
GYRATION = np.sqrt(3000.0)  # root of moment of inertia / mass
GAP = AGENT + 9.0  # from the agent's centre to the block, on the way around it
CONTACTS_EVERY, WAYPOINTS_EVERY = 40.0, 12.0
CORNER = 3.0  # between a contact and a corner, at least


def _normals() -> Floats:
    """Unit vectors to the outside, one for each edge of the outline: (8, 2)."""
    along = np.roll(OUTLINE, -1, axis=0) - OUTLINE
    normals: Floats = np.column_stack([along[:, 1], -along[:, 0]]) / np.linalg.norm(along, axis=1)[:, None]
    return normals


def _contacts() -> tuple[Floats, Floats]:
    """Places on the outline, and the normals there: (n, 2) both. The agent has no room in the corners under the bar."""
    places, normals = [], []
    for edge, normal in enumerate(_normals()):
        before, begin, end, after = OUTLINE[np.arange(edge - 1, edge + 3) % len(OUTLINE)]
        length = np.linalg.norm(end - begin)
        first = GAP if (before - begin) @ normal > 0 else CORNER
        last = length - (GAP if (after - end) @ normal > 0 else CORNER)
        at = np.linspace(first, last, max(2, 1 + int((last - first) / CONTACTS_EVERY)))
        places.append(begin + at[:, None] * (end - begin) / length)
        normals.append(np.broadcast_to(normal, places[-1].shape))
    return np.concatenate(places), np.concatenate(normals)


CONTACTS, NORMALS = _contacts()
# How a push at each contact moves the block: (x, y, GYRATION * angle) for a force of 1 along the normal, (n, 3).
TWISTS = np.column_stack([-NORMALS, -np.linalg.det(np.stack([CONTACTS - CENTRE, NORMALS], 1)) / GYRATION])
STANDS = CONTACTS + GAP * NORMALS  # where the agent's centre is before it pushes


class Loop:
    """A closed way through `corners` (n, 2)."""

    def __init__(self, corners: Floats) -> None:
        self._corners = corners
        self._edges = np.roll(corners, -1, axis=0) - corners
        self._lengths = np.linalg.norm(self._edges, axis=1)
        self._begins = np.cumsum(self._lengths) - self._lengths
        self.length = float(self._lengths.sum())

    def nearest(self, places: Floats) -> tuple[Floats, Floats]:
        """(how far along the loop it comes nearest to each of `places` (n,), where that is (n, 2))."""
        shares = np.clip(((places[:, None] - self._corners) * self._edges).sum(-1) / self._lengths**2, 0, 1)
        found = self._corners + shares[..., None] * self._edges
        best = ((places[:, None] - found) ** 2).sum(-1).argmin(1)
        rows = np.arange(len(places))
        return self._begins[best] + shares[rows, best] * self._lengths[best], found[rows, best]

    def waypoints(self, every: float) -> Floats:
        """The corners, and places between them: (n, 2)."""
        shares = [np.linspace(0, 1, max(1, int(length / every)), endpoint=False)[:, None] for length in self._lengths]
        return np.concatenate(
            [corner + share * edge for corner, share, edge in zip(self._corners, shares, self._edges, strict=True)]
        )


WAY = Loop(OUTLINE + GAP * (_normals() + np.roll(_normals(), 1, axis=0)))
WAYPOINTS = WAY.waypoints(WAYPOINTS_EVERY)
WAYPOINTS_AT, STANDS_AT = WAY.nearest(WAYPOINTS)[0], WAY.nearest(STANDS)[0]


def distance(places: Floats) -> Floats:
    """From places (..., 2) to the block: (...). 0 inside."""
    beyond = (np.maximum(np.abs(places - middle) - half, 0) for middle, half in (BAR, STEM))
    found: Floats = np.sqrt(np.minimum(*((each**2).sum(-1) for each in beyond)))
    return found
