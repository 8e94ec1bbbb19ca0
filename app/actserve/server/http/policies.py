"""`/policies`: the policies that are served, and their manifests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from actserve.server.http.requests import registry_of

router = APIRouter(tags=["policies"])


@router.get("/policies")
async def list_policies(request: Request) -> dict[str, Any]:
    """Every policy: its live version, its runtime and the reason for it. `/act` uses the default policy.

    If the service records, `recording` counts the steps recorded and dropped by this worker since it started, and says
    why recording has `stopped`, if it has.
    """
    registry = registry_of(request)
    described: dict[str, Any] = {
        "default": registry.default,
        "policies": [registry.describe(name) for name in registry.names],
    }
    if registry.recorder is not None:
        described["recording"] = registry.recorder.describe()
    return described


@router.get("/policies/{name}")
async def get_policy(request: Request, name: str) -> dict[str, Any]:
    """One policy with its manifest, and the versions that were refused, with reasons."""
    registry = registry_of(request)
    return {**registry.describe(name), "manifest": registry.manifest(name)}
