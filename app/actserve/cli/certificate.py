"""Prints a certificate as text."""

from __future__ import annotations

from typing import Any


def print_certificate(certificate: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    samples, origin = certificate["samples"], certificate["samples_from"]
    sizes = ", ".join(map(str, certificate["batch_sizes"]))
    table = Table(title=f"certificate: {samples} samples ({origin}), in batches of {sizes}")
    for heading in ("program", "compared", "actions that differ", "largest difference"):
        table.add_column(heading)
    for runtime, found in certificate["programs"].items():
        differences = ", ".join(f"{name} {value:.2g}" for name, value in found["largest_difference"].items())
        table.add_row(f".{runtime}", f"{found['compared']:,}", str(found["action_disagreements"]), differences)
    Console().print(table)
    print(f"compared with {certificate['reference']}")
    rollouts = {found["rollout"]["steps"] for found in certificate["programs"].values() if "rollout" in found}
    if rollouts:
        print(f"rollout of {max(rollouts)} steps with carried state and resets: no action differs")
    if followed := [
        found["rollout"]["steps_until_rounding_adds_up"]
        for found in certificate["programs"].values()
        if "steps_until_rounding_adds_up" in found.get("rollout", {})
    ]:
        print(f"its state amplifies rounding: after {min(followed)} steps or more it differs beyond the tolerance")
    if "statistics" in certificate:
        found = certificate["statistics"]
        print(
            f"{found['draws']:,} random actions have the policy's distribution: {found['test']}, p = {found['p']:.2g}"
        )
    if "original" in certificate:
        original = certificate["original"]
        print(f"the reference was compared with {original['name']}: {original['compared']} actions, none differs")
    if "limits" in certificate:
        _print_limits(certificate["limits"])
    for runtime, found in certificate.get("evaluation", {}).get("programs", {}).items():
        low, high = found["mean_interval"] or (found["mean"], found["mean"])
        print(
            f".{runtime}: {found['games']} games through HTTP, mean score {found['mean']:+.2f} ({low:+.2f} to "
            f"{high:+.2f}), {found['lowest']:+.0f} to {found['highest']:+.0f}, {found['lost']} lost"
        )
    for precision in ("int8", "bf16"):
        if precision in certificate:
            _print_narrow(precision, certificate[precision])
    if counts := certificate.get("actions"):
        shares = ", ".join(f"{action} in {count / samples:.0%}" for action, count in counts.items())
        print(f"chosen actions: {shares}" + ("; always the same action, which proves little" * (len(counts) == 1)))
    for runtime, reason in certificate.get("missing", {}).items():
        print(f"no .{runtime}: {reason}")
    for gap in certificate.get("not_shown", ()):
        print(f"not shown: {gap}")
    if certificate["smallest_margin"] is not None:
        print(f"smallest margin of a chosen action: {certificate['smallest_margin']:.3g}")


def _print_limits(shown: dict[str, Any]) -> None:
    """The results of fuzzing the limits."""
    for runtime, found in shown["programs"].items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found["reasons"].items())
        print(
            f"limits of .{runtime}: {found['inputs']:,} fuzzed inputs, {found['limited']:,} limited"
            + (f" ({reasons})" if reasons else "")
            + f", {found['outside']} outside"
            + (f"; it fails on {found['refused']:,}" if found.get("refused") else "")
        )
    if "equal_where_not_limited" in shown:
        print(
            f"without limits {shown['outside_without_limits']:,} of {shown['inputs']:,} were outside; "
            f"{shown['equal_where_not_limited']:,} were not limited: equal to the policy's own, bit for bit"
        )


def _print_narrow(precision: str, found: dict[str, Any]) -> None:
    """A program in `precision`, compared with the one in float32."""
    print(f"{precision}: {found['agreement']:.2%} of the actions equal the original's")
    if scores := found.get("scores"):
        played = "; ".join(f"{who} {', '.join(f'{score:+.0f}' for score in each)}" for who, each in scores.items())
        print(f"scores of the same games: {played}")
    if lead := found.get("largest_lead_of_a_changed_action"):
        print(
            f"where they differ, the original's action led by at most {lead:.2g}; its median lead is "
            f"{found['median_lead']:.2g}"
        )
    if changing := found.get("actions_that_depend_on_the_batch"):
        print(f"{changing} of {found['samples']:,} actions depend on the size of the batch")
