"""The commands that other packages add: a `typer.Typer` in the entry-point group `actserve.commands`."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperGroup

PLUGINS = "actserve.commands"


def plugin_commands() -> dict[str, Any]:
    """The plugins' commands by name. Skips a plugin that is registered but not installed."""
    found: dict[str, Any] = {}
    for plugin in entry_points(group=PLUGINS):
        try:
            commands = plugin.load()
        except ModuleNotFoundError as error:
            if error.name != plugin.module.partition(".")[0]:
                raise
            continue
        group = typer.main.get_command(commands)
        assert isinstance(group, TyperGroup)
        found |= group.commands
    return found


class Extended(TyperGroup):
    """A group of this package to which plugins add commands, in a group with the same name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self._added()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or self._added().get(cmd_name)

    def _added(self) -> dict[str, Any]:
        group = plugin_commands().get(self.name or "")
        return dict(group.commands) if isinstance(group, TyperGroup) else {}
