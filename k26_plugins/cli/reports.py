"""The files that a command writes in addition to its output: JSON, and one HTML page with plots."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click

from k26_plugins.cli.command import PATH
from k26_plugins.cli.console import fail

json_option = click.option("--json", "json_out", type=PATH, help="Write everything measured as JSON.")
html_option = click.option("--html", "html_out", type=PATH, help="Write one page with plots.")


def require_plots(html_out: Path | None, code: int) -> None:
    """End the command with `code` before its work if an HTML page is wanted and matplotlib is not installed."""
    if html_out is not None and find_spec("matplotlib") is None:
        fail("--html needs matplotlib. pip install 'k26-plugins[report]'", code)


def require_writable(*files: Path | None, code: int = 1) -> None:
    """End the command with `code` before its work, which may take hours, if one of its outputs cannot be written.

    Each file is opened to find out; what it holds is not changed, and a file that did not exist is removed again.
    """
    for file in files:
        if file is None:
            continue
        try:
            is_new = not file.exists()
            file.open("ab").close()
            if is_new:
                file.unlink()
        except OSError as error:
            fail(f"{file} cannot be written ({error.strerror}): nothing was done yet.", code)


def write(file: Path | None, content: Callable[[], str]) -> None:
    """Write a report if a file is named for it. content: called only then."""
    if file is not None:
        file.write_text(content(), encoding="utf-8")
