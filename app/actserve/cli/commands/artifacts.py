"""`actserve inspect`, `verify`, `diff` and `doctor`: show the artifacts of a store and check them on this host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from actserve.cli.certificate import print_certificate
from actserve.cli.commands.bundles import verify_bundle
from actserve.cli.commands.recordings import open_recording, progress_bar
from actserve.cli.limits import describe_limits
from actserve.cli.stores import DEFAULT_STORE, Label, Store, TrustOption, find, open_for_reading
from actserve.cli.terminal import Json, console, flag, print_json
from actserve.core.environment import game_of
from actserve.core.errors import UntrustedProgram, UsageError
from actserve.core.robot import Robot


def inspect(
    label: Label,
    store: Store = DEFAULT_STORE,
    graph: Annotated[bool, flag("--graph", says="Print only the exported graph.")] = False,
    json: Json = False,
) -> None:
    """Show an artifact: its signature, programs, environment and certificate."""
    from actserve.bundles.bundle import noted

    artifact = find(open_for_reading(store), label)
    manifest = artifact.manifest
    if graph:
        print(artifact.read("graph.txt").decode())
        return
    if json:
        print_json(manifest.to_dict())
        return
    print(f"{artifact.label}  created {manifest.created}")
    signature = manifest.signature
    for title, specs in (("takes", signature.request_inputs), ("gives", signature.outputs)):
        for spec in specs:
            print(f"  {title}  {spec.name}: {spec}" + (f", {spec.range}" if spec.range else ""))
    print(f"  modes  {', '.join(signature.exploration)}")
    for noise in signature.noise:
        print(f"  draws  {noise.spec.name}: {noise.spec}, {noise.distribution}, from the seed of the request")
    print(f"  batch  {f'1 to {signature.max_batch}' if signature.max_batch > 1 else 'one item a call'}")
    for line in describe_limits(signature):
        print(f"  limits  {line}")
    for runtime, program in manifest.programs.items():
        print(f"  .{runtime}  {manifest.files[program.file].bytes:,} bytes, requires {_needs(program.requires)}")
        for rewrite in program.rewrites:
            print(f"      rewritten: {rewrite}")
    if isinstance(manifest.environment, Robot):
        _print_robot(manifest.environment)
    if game := game_of(manifest.environment):
        actions = ", ".join(f"{i}={action.meaning}({action.code})" for i, action in enumerate(game.actions))
        print(f"  plays  {game.id}: frame skip {game.frame_skip}, sticky {game.repeat_action_probability}; {actions}")
    print_certificate(manifest.certificate)
    for verified in noted(artifact):
        print(f"verified in a bundle: {verified}")


def _print_robot(robot: Robot) -> None:
    print(f"  joints  {', '.join(robot.joints)}")
    command = f"action × {_listed(robot.action_scale, '1')} + {_listed(robot.action_offset, '0')}"
    print(f"  command  {command}{f', {robot.action_units}' if robot.action_units else ''}")
    if robot.control_period_s:
        print(f"  period  {robot.control_period_s:g} s between actions")
    for name, values in (
        ("default", robot.default_positions),
        ("stiffness", robot.stiffness),
        ("damping", robot.damping),
    ):
        if values:
            print(f"  {name}  {_listed(values, '')}")
    for term in robot.observations:
        details = [f"× {_listed(term.scale, '1')}"] if term.scale else []
        details += [f"{term.history} steps"] if term.history > 1 else []
        details += [term.units] if term.units else []
        details += [" ".join(term.elements)] if term.elements else []
        print(f"  observes  {', '.join([term.name, *details])}")


def _listed(values: tuple[float, ...], default: str) -> str:
    numbers = [f"{value:g}" for value in values]
    return f"[{', '.join(numbers)}]" if len(numbers) > 1 else (numbers or [default])[0]


def verify(
    label: Annotated[
        str | None, typer.Argument(metavar="NAME[@VERSION]", help="Policy, and optionally its version.")
    ] = None,
    store: Store = DEFAULT_STORE,
    trust: TrustOption = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Check this bundle, with its own code, in place of an artifact.")
    ] = None,
    json: Json = False,
) -> None:
    """Check an artifact: the hash of each file, and the golden samples on each program that this host can run."""
    if (label is None) == (bundle is None):
        raise UsageError("expected NAME[@VERSION] or --bundle DIR")
    if bundle is not None:
        verify_bundle(bundle, store, json)
        return
    assert label is not None
    from actserve.engine import golden
    from actserve.engine.runtimes import preflight
    from actserve.engine.runtimes.load import load

    source = open_for_reading(store, trust)
    artifact = find(source, label)
    source.verify(artifact)
    results: dict[str, Any] = {}
    for runtime in artifact.manifest.programs:
        reason = preflight.refusal(runtime, artifact.manifest, preflight.this_host())
        if reason is None:
            try:
                agreement = golden.check(artifact, load(runtime, artifact).run)
                results[runtime] = {"ran": True, "holds": agreement.holds, **agreement.summary()}
                continue
            except UntrustedProgram as error:
                reason = error.message
        results[runtime] = {"ran": False, "reason": reason}
    if json:
        manifest = artifact.manifest
        print_json({"name": manifest.name, "version": manifest.version, "signer": artifact.signer, "programs": results})
    else:
        print(f"{artifact.label}: all {len(artifact.manifest.files)} files match the manifest")
        if artifact.signer or trust:
            print(f"  signed by {artifact.signer}" if artifact.signer else "  not signed by a trusted key")
        for runtime, found in results.items():
            print(f"  .{runtime}: {_verdict(found)}")
    if not all(found.get("holds", True) for found in results.values()):
        raise typer.Exit(1)


def diff(
    before: Label,
    after: Label,
    store: Store = DEFAULT_STORE,
    trust: TrustOption = None,
    recording: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Compare the actions on this recording, in place of the golden samples."),
    ] = None,
    json: Json = False,
) -> None:
    """Compare two artifacts: signature, actions on golden samples or on a recording, speed and size."""
    from actserve.cli.tools import diff as differ

    source = open_for_reading(store, trust)
    artifacts = find(source, before), find(source, after)
    if recording is None:
        found = differ.diff(*artifacts)
    else:
        steps = open_recording(recording).of(artifacts[0].manifest.name)
        from actserve.cli.tools.recorded_agreement import agreement

        with progress_bar("comparing", steps.count) as progress:
            found = differ.diff(*artifacts, lambda one, other: agreement(steps, one, other, progress))
    if json:
        print_json(found.as_json())
    else:
        from rich.console import Console

        differ.show(found, Console())


def doctor(
    name: Annotated[str | None, typer.Argument(help="Policy to check; default: every policy of the store.")] = None,
    store: Store = DEFAULT_STORE,
    trust: TrustOption = None,
    json: Json = False,
) -> None:
    """List the programs that this host can run, and why it cannot run the others."""
    from actserve.cli.tools.doctor import diagnose, print_diagnosis

    with console().status("checking the programs"):
        diagnosis = diagnose(open_for_reading(store, trust), name)
    if json:
        print_json(diagnosis.as_json())
    else:
        print_diagnosis(diagnosis)


def _needs(requires: dict[str, Any]) -> str:
    listed = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in requires.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in listed.items()) or "nothing"


def _verdict(found: dict[str, Any]) -> str:
    if not found["ran"]:
        return f"not run here: {found['reason']}"
    if found["holds"]:
        return f"agrees on all {found['compared']} golden samples"
    return (
        f"DISAGREES on {len(found['differing'])} of {found['compared']} golden samples; "
        f"beyond tolerance: {', '.join(found['exceeding']) or 'none'}"
    )
