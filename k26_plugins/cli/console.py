"""The output that all commands share: consoles, progress bars, and the end of a command that fails."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NoReturn

import click

from k26_plugins.cli.command import PATH, Argument

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

folder_argument = click.argument("folder", cls=Argument, type=PATH, metavar="DIR", about="A checkpoint's folder.")


# The consoles are functions because importing rich takes as long as everything else that `k26 --help` does.
@cache
def out() -> Console:
    """Return the console that prints on the output stream."""
    from rich.console import Console

    return Console()


@cache
def err() -> Console:
    """Return the console that prints on the error stream."""
    from rich.console import Console

    return Console(stderr=True)


def fail(error: Exception | str, code: int = 1) -> NoReturn:
    """Print what is wrong on the error stream, and end the command with the exit status `code`."""
    err().print("[red]error:[/]", end=" ")
    err().print(str(error), highlight=False, markup=False, soft_wrap=True)
    raise click.exceptions.Exit(code)


def progress_bar() -> Progress:
    """Return a progress bar on the error stream with counts, the elapsed time and an estimate of the time left."""
    from rich import progress

    return _bar(progress.MofNCompleteColumn(), progress.TimeElapsedColumn())


def bytes_bar() -> Progress:
    """Return a progress bar on the error stream with bytes, their rate and an estimate of the time left."""
    from rich import progress

    return _bar(progress.DownloadColumn(), progress.TransferSpeedColumn())


def _bar(*figures: ProgressColumn) -> Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *figures,
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=err(),
        transient=True,
    )
