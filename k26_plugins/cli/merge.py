"""`k26 merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k26_plugins.cli.console import Folder, bytes_bar, fail


def merge(
    folder: Folder,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder, as PEFT writes it.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
) -> None:
    """Write a checkpoint into which a LoRA adapter is merged: every engine serves it, also where it refuses the adapter.

    Modules may be named as the hub's class, transformers' own, or a class of the language model alone names them. Routed
    experts are quantised again as the published ones are; the last line says how much of the adapter's change of them that
    rounds away. Takes the memory of one matrix and the space of a second checkpoint.
    """
    from k26_plugins.common.checkpoint import CheckpointError
    from k26_plugins.common.checkpoint.header import weight_files
    from k26_plugins.common.config import ConfigError
    from k26_plugins.operate.merge import MergeError
    from k26_plugins.operate.merge import merge as run_merge

    try:
        with bytes_bar() as progress:
            size = sum(file.stat().st_size for file in weight_files(folder))
            task = progress.add_task("merging", total=size)
            report = run_merge(folder, adapter, target, lambda count: progress.advance(task, count))
    except (MergeError, CheckpointError, ConfigError, OSError) as error:
        fail(error)
    typer.echo(f"{report.num_modules} linear layers were changed, {report.num_int4} of them INT4.")
    if report.num_int4:
        typer.echo(f"Rounding those to INT4 is an error of {report.share_lost:.0%} of the adapter's change of them.")
