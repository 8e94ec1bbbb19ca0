"""The Accept header (RFC 9110, 12.5.1)."""

from __future__ import annotations


def quality(accept: str, content_type: str) -> float:
    """The quality (0 to 1) that an Accept header gives `content_type`. The most specific matching range decides."""
    if not accept.strip():
        return 1.0
    ranges = {"*/*": 0, content_type.split("/")[0] + "/*": 1, content_type: 2}
    best = (-1, 0.0)  # (specificity, quality)
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if media_range in ranges:
            weights = [p[2:] for p in parameters if p.startswith("q=")]
            try:
                best = max(best, (ranges[media_range], float(weights[0]) if weights else 1.0))
            except ValueError:
                continue
    return best[1]
