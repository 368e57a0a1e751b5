"""Click's classes for groups, commands, arguments and parameter types, with what click's own classes lack."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


class Group(click.Group):
    """A group that lists its commands in the given order, where click sorts them, and ends with 130 on an interrupt."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the given order."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and end with 130 if the user interrupts it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise click.exceptions.Exit(130) from interrupt


class Command(click.Command):
    """A command whose help has a line for each argument.

    The list of commands shows the whole first paragraph of its help, where click cuts the first sentence short.
    """

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first paragraph of the help, for the list of commands."""
        return " ".join((self.help or "").partition("\n\n")[0].split())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of the arguments, then that of the options."""
        arguments = [
            (parameter.human_readable_name, parameter.about)
            for parameter in self.params
            if isinstance(parameter, Argument)
        ]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        super().format_options(ctx, formatter)


class Argument(click.Argument):
    """An argument with a line of help (`about`), which click's own class takes only from 8.5 on."""

    def __init__(self, *declarations: Any, about: str, **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.about = about


class OneOf(click.Choice[StrEnum]):
    """A member of an enumeration that is given by its value; click's own class goes by the member's name."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        """Return the value by which a member is given."""
        return str(choice)


class FloatRange(click.FloatRange):
    """A range that refuses NaN, which click's own class takes because NaN is neither too small nor too large."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails for NaN, and as click's own class does."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number
