"""What every command prints with, and how it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

out = Console()
err = Console(stderr=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.", show_default=False)]


def fail(error: Exception | str, code: int = 1) -> NoReturn:
    """Say what is wrong on the error stream and end with `code`."""
    err.print("[red]error:[/]", end=" ")
    err.print(str(error), highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def progress_bar() -> Progress:
    """A bar on the error stream with counts, the time it took and an estimate of what is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, transient=True)


def bytes_bar() -> Progress:
    """As `progress_bar`, for bytes, with their rate."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, transient=True)
