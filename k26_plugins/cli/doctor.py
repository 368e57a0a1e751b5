"""`k26 doctor`: say why serving does not work in this environment, or that it should."""

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
    """Examine this environment: versions, GPUs, whether the plugin is active in each engine, the experts' self-test.

    Measures how fast weights are read from memory and copied to each GPU, and with --checkpoint also how fast they are
    read from its disk.

    Each engine is asked in its own process, which loads plugins as a server does. The self-test is the one that a
    server makes when it loads the model: the result of each experts backend is compared with the plain dequantized
    product, on this device.

    Exits with 0 if nothing is bad and with 1 if something is.
    """
    from k26_plugins.operate.doctor import Level, examine

    with err().status("looking") as status:
        chosen = None if engine is None else engine.value
        findings = examine(checkpoint, chosen, lambda stage: status.update(f"looking at {stage}"))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    elif fix:
        show(findings, err())
        # Two findings may have the same fix, which is printed once.
        for command in dict.fromkeys(finding.fix for finding in findings if finding.fix):
            click.echo(command)
    else:
        show(findings, out())
    if any(finding.level == Level.BAD for finding in findings):
        raise click.exceptions.Exit(1)


def show(findings: list[Finding], console: Console) -> None:
    """Print each finding on a line with its level, and its remedy below if it has one."""
    for finding in findings:
        console.print(f"{finding.level:>4}", end="  ", style=COLOURS[finding.level])
        console.print(f"{finding.what}: {finding.detail}", highlight=False, markup=False, soft_wrap=True)
        if finding.remedy:
            console.print(f"      remedy: {finding.remedy}", highlight=False, markup=False, soft_wrap=True)
