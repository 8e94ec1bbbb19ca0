"""The programs of a policy in a narrower precision, which `serve --precision any` may choose."""

from __future__ import annotations

import logging

from actserve.core.errors import StoreError, UnknownPolicy
from actserve.store.artifact import Artifact
from actserve.store.local import ModelStore

log = logging.getLogger("actserve")

PRECISIONS = ("int8", "bf16")  # `actserve export NAME --precision int8` publishes NAME-int8
ORIGINAL = "narrowed_from"  # in the provenance


def narrower(store: ModelStore, artifact: Artifact, fetch: bool = True) -> list[Artifact]:
    """What was made of this version in a narrower precision, the newest of each; it has the same signature.

    `fetch`: a remote store may download it.
    """
    found = []
    for precision in PRECISIONS:
        name = f"{artifact.manifest.name}-{precision}"
        try:
            versions = store.versions(name)
        except UnknownPolicy:
            continue
        for version in reversed(versions):
            try:
                other = store.resolve(name, version, fetch)
            except StoreError as error:
                log.warning("%s@%d is not used for %s: %s", name, version, artifact.label, error.message)
                continue
            made_of = other.manifest.provenance.get(ORIGINAL)
            if made_of == artifact.label and other.manifest.signature == artifact.manifest.signature:
                found.append(other)
                break
    return found
