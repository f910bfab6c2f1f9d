"""The directive `commands`: the help of every command of golddiff, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator

import click
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

from golddiff.cli import app as golddiff

WIDTH = 88


def helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Yields the full name and the help of a command and of all below it."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from helps(below, click.Context(below, info_name=name, parent=context, terminal_width=WIDTH))


class Commands(Directive):
    """One section for each command, with its help as a literal block."""

    def run(self) -> list[nodes.Node]:
        sections: list[nodes.Node] = []
        context = click.Context(golddiff, info_name="golddiff", terminal_width=WIDTH, **golddiff.context_settings)
        for name, text in helps(golddiff, context):
            section = nodes.section("", nodes.title("", name), ids=[nodes.make_id(name)], names=[name])
            section += nodes.literal_block(text, text, language="text")
            sections.append(section)
        return sections


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("commands", Commands)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
