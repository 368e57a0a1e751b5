"""Completion of `k26` in a shell: the options that print click's script for it, or have it read that at each start."""

from __future__ import annotations

import os
from pathlib import Path

import click

from k26_plugins.cli.console import fail

VARIABLE = "_K26_COMPLETE"
SHELLS = {
    "bash": (".bashrc", f'eval "$({VARIABLE}=bash_source k26)"'),
    "zsh": (".zshrc", f'eval "$({VARIABLE}=zsh_source k26)"'),
    "fish": (".config/fish/completions/k26.fish", f"{VARIABLE}=fish_source k26 | source"),
}
"""For each shell, the file in the home folder that it reads, and the line to add to this file."""


def _shell() -> str:
    """Return the name of the user's shell; end the command if there is no completion for it."""
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        fail(f"SHELL names {name or 'no shell'}: completion is there for {', '.join(SHELLS)}.")
    return name


def _show(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        from click.shell_completion import get_completion_class

        shell = get_completion_class(_shell())
        assert shell is not None
        click.echo(shell(ctx.command, {}, "k26", VARIABLE).source())
        ctx.exit()


def _install(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted:
        name, line = SHELLS[_shell()]
        file = Path.home() / name
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if line not in text.splitlines():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write(f"{line}\n" if text.endswith("\n") or not text else f"\n{line}\n")
        click.echo(f"{file} has the line: {line}\nIt counts from the next shell on.")
        ctx.exit()


COMPLETION = [
    click.Option(
        ["--install-completion"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_install,
        help="Install completion for the current shell.",
    ),
    click.Option(
        ["--show-completion"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show,
        help="Show completion for the current shell, to copy it or customize the installation.",
    ),
]
