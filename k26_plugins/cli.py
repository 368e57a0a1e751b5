"""The command line `k26`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    name="k26",
    help="Kimi-K2.6 for vLLM, SGLang and KTransformers: look at a checkpoint, check it, make a small one, run the reference.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

CheckpointFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.", show_default=False)]


def fail(error: Exception | str) -> NoReturn:
    err.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command()
def tensors(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A config.json, or a checkpoint's folder.", show_default=False)
    ],
    every: Annotated[bool, typer.Option("--all", help="A line for every single tensor, tab-separated.")] = False,
) -> None:
    """Print the table of tensors that a configuration implies, with its sums.

    Reads the configuration only. Layers and experts that repeat are folded into one line unless --all is given.
    """
    from k26_plugins.common.checkpoint import tensor_table
    from k26_plugins.common.config import ConfigError, K26Config

    try:
        specs = list(tensor_table(K26Config.from_path(config)).values())
    except ConfigError as error:
        fail(error)
    if every:
        for spec in specs:
            cut = "-" if spec.shard_dim is None else str(spec.shard_dim)
            typer.echo(f"{spec.name}\t{spec.dtype}\t{list(spec.shape)}\t{cut}\t{spec.num_bytes}")
    else:
        out.print(_folded_table(specs))
    total = sum(spec.num_bytes for spec in specs)
    out.print(f"{len(specs):,} tensors, {total:,} bytes ({total / 2**30:.2f} GiB)", highlight=False)


def _folded_table(specs: list) -> Table:  # type: ignore[type-arg]
    import re

    folded: dict[str, list] = {}  # type: ignore[type-arg]
    for spec in specs:
        folded.setdefault(re.sub(r"\.\d+\.(?!weight|bias)", ".*.", spec.name), []).append(spec)
    table = Table("tensor", "number", "dtype", "shape", "cut by tensor parallel", "bytes")
    return table
