"""Why it does not work, or that it should."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k26_plugins.cli.command import PATH, Command, OneOf
from k26_plugins.cli.console import err, out
from k26_plugins.cli.plan import Engine

if TYPE_CHECKING:
    from rich.console import Console

    from k26_plugins.operate.doctor import Finding

COLOURS = {"ok": "green", "note": "yellow", "BAD": "bold red"}


@click.command(cls=Command)
@click.option("--checkpoint", type=PATH, help="A checkpoint's folder, to be looked at too.")
@click.option("--engine", type=OneOf(Engine), help="One that must be installed here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--fix/--no-fix",
    default=False,
    help="Print the commands that mend what was found, and run none; the rest as errors are.",
)
def doctor(checkpoint: Path | None, engine: Engine | None, as_json: bool, fix: bool) -> None:
    """Look at this environment: versions, GPUs, whether the plugin is active in each engine, and the experts' self-test.

    Measures how fast weights move: read from memory, copied to each GPU, and with a checkpoint read from its disk.

    Each engine is asked in a process of its own that loads plugins as a server does. The self-test is the one that a
    server makes when it loads the model: each experts backend against the plain dequantized product, on this device.

    Exits with 0 where nothing is bad and with 1 where something is.
    """
    from k26_plugins.operate.doctor import Level, examine

    with err().status("looking") as status:
        chosen = None if engine is None else engine.value
        findings = examine(checkpoint, chosen, lambda stage: status.update(f"looking at {stage}"))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    elif fix:
        show(findings, err())
        # One command for what is found twice.
        for command in dict.fromkeys(finding.fix for finding in findings if finding.fix):
            click.echo(command)
    else:
        show(findings, out())
    if any(finding.level == Level.BAD for finding in findings):
        raise click.exceptions.Exit(1)


def show(findings: list[Finding], console: Console) -> None:
    for finding in findings:
        console.print(f"{finding.level:>4}", end="  ", style=COLOURS[finding.level])
        console.print(f"{finding.what}: {finding.detail}", highlight=False, markup=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"      remedy: {finding.remedy}", highlight=False, markup=False, soft_wrap=True)
