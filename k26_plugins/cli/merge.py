"""`k26 merge`: merge a LoRA adapter into a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from k26_plugins.cli.command import PATH, Argument, Command
from k26_plugins.cli.console import bytes_bar, fail, folder_argument


@click.command(cls=Command)
@folder_argument
@click.argument(
    "adapter", cls=Argument, type=PATH, metavar="ADAPTER", about="A LoRA adapter's folder, as PEFT writes it."
)
@click.argument("target", cls=Argument, type=PATH, metavar="OUT", about="A new folder.")
def merge(folder: Path, adapter: Path, target: Path) -> None:
    """Write a checkpoint with a LoRA adapter merged into it, which every engine serves, even if it refuses the adapter.

    The adapter may name modules as the hub's class does, as transformers' own class does, or as a class of the language
    model alone does. Routed experts are quantized again in the way of the published ones; the last line of output says
    how much of the adapter's change to them is lost by this rounding. Takes the memory of one matrix, and the disk
    space of a second checkpoint.
    """
    from k26_plugins.common.checkpoint import CheckpointError
    from k26_plugins.common.model.config import ConfigError
    from k26_plugins.operate.merge import MergeError
    from k26_plugins.operate.merge import merge as run_merge

    try:
        with bytes_bar() as progress:
            task = progress.add_task("merging", total=None)
            report = run_merge(
                folder, adapter, target, lambda count, size: progress.update(task, advance=count, total=size)
            )
    except (MergeError, CheckpointError, ConfigError, OSError) as error:
        fail(error)
    click.echo(f"{report.num_modules} linear layers were changed, {report.num_int4} of them INT4.")
    if report.num_int4:
        click.echo(f"Rounding those to INT4 is an error of {report.share_lost:.0%} of the adapter's change of them.")
