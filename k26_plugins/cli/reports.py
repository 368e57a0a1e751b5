"""The files that a command writes beside what it prints: JSON, and one HTML page with plots."""

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
    """A page that cannot be written is said before the work, not after it."""
    if html_out is not None and find_spec("matplotlib") is None:
        fail("--html needs matplotlib. pip install 'k26-plugins[report]'", code)


def require_writable(*files: Path | None, code: int = 1) -> None:
    """Outputs are tried before the work, which may take hours: each is opened without a change to what it holds."""
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
    """A report, where one is wanted."""
    if file is not None:
        file.write_text(content(), encoding="utf-8")
