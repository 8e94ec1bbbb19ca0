"""The Accept header (RFC 9110, 12.5.1)."""

from __future__ import annotations


def quality(accept: str, content_type: str) -> float:
    """How much an Accept header wants `content_type`; the most specific range that matches decides."""
    if not accept.strip():
        return 1.0
    ranges = {"*/*": 0, content_type.split("/")[0] + "/*": 1, content_type: 2}
    found = (-1, 0.0)
    for part in accept.split(","):
        essence, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if essence in ranges:
            weights = [p[2:] for p in parameters if p.startswith("q=")]
            try:
                found = max(found, (ranges[essence], float(weights[0]) if weights else 1.0))
            except ValueError:
                continue
    return found[1]
