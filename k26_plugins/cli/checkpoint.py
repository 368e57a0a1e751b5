"""Commands about a checkpoint: its tensors, whether it is whole, and a small one to try things on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from k26_plugins.cli.console import Folder, fail, out, progress_bar

if TYPE_CHECKING:
    from k26_plugins.common.checkpoint import TensorSpec


def tensors(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A config.json, or a checkpoint's folder.", show_default=False)
    ],
    every: Annotated[bool, typer.Option("--all", help="A tab-separated line for every single tensor.")] = False,
) -> None:
    """Print the tensors that a configuration implies, with their sums.

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
    typer.echo(f"{len(specs):,} tensors, {total:,} bytes ({total / 2**30:.2f} GiB)")


def _folded_table(specs: list[TensorSpec]) -> Table:
    folded: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        pattern = re.sub(r"(layers|experts|blocks)\.\d+", r"\1.*", spec.name)
        folded.setdefault(f"{pattern} {spec.shape}", []).append(spec)
    table = Table(
        Column("tensor", overflow="fold"),
        "number",
        "dtype",
        "shape",
        "cut along",
        "bytes",
        title="* stands for every number",
    )
    for key, group in folded.items():
        first = group[0]
        cut = "" if first.shard_dim is None else str(first.shard_dim)
        total = sum(spec.num_bytes for spec in group)
        table.add_row(key.split(" ")[0], f"{len(group):,}", first.dtype, str(list(first.shape)), cut, f"{total:,}")
    return table


def check(folder: Folder) -> None:
    """Hold a checkpoint against its table of tensors: names, shapes, dtypes and file sizes.

    What is wrong with files comes first, then tensors, a line for all of a kind in a layer. A checkpoint of this
    architecture in another layout (NVFP4, another quantisation, a draft layer) is not damaged: an engine's own code serves
    it. Reads headers, not weights: seconds for the published 64 files. Exits with 1 where something is wrong. Says too
    where the folder's chat template, which is the one that is used, renders a conversation otherwise than the one that
    ships.
    """
    from k26_plugins.common.checkpoint import CheckpointError, folded
    from k26_plugins.common.checkpoint import check as run_check
    from k26_plugins.common.config import ConfigError
    from k26_plugins.common.prompt.template_check import differing_samples

    with progress_bar() as progress:
        task = progress.add_task("reading headers")
        try:
            report = run_check(folder, lambda done, total: progress.update(task, completed=done, total=total))
        except (CheckpointError, ConfigError) as error:
            progress.stop()
            fail(error)
    for line in folded(report.problems):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    sums = f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes in {report.num_files} files"
    if report.other_layout:
        typer.echo(f"{sums}, this architecture in another layout, which an engine's own code serves:")
        for reason in report.other_layout:
            typer.echo(f"  {reason}")
    else:
        typer.echo(f"{sums} are right.")
    if differing := differing_samples(folder):
        typer.echo(f"chat_template.jinja renders otherwise than the one that ships: {', '.join(differing)}.")
    if report.problems:
        fail(f"{len(report.problems):,} faults.")


def tiny(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)],
    layers: Annotated[int, typer.Option(help="Decoder layers; the first is dense.")] = 3,
    experts: Annotated[int, typer.Option(help="Routed experts of a layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that a token goes to.")] = 2,
    hidden_size: Annotated[int, typer.Option(help="A multiple of 64.")] = 128,
    moe_intermediate_size: Annotated[int, typer.Option(help="Of one expert; a multiple of 32.")] = 64,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    vocab_size: Annotated[int, typer.Option(help="163840 gives the special tokens their published ids.")] = 512,
    vision_layers: Annotated[int, typer.Option(help="Layers of the vision tower.")] = 2,
    shards: Annotated[int, typer.Option(help="Weight files.")] = 3,
    seed: Annotated[int, typer.Option(help="The same sizes and seed give the same bytes.")] = 0,
) -> None:
    """Write a small random checkpoint with exactly Kimi-K2.6's structure: a few MB, in seconds.

    Every engine can be tried on it without a GPU. Its answers are noise, the same noise in every engine.
    """
    from k26_plugins.common.config import ConfigError
    from k26_plugins.common.tiny import TinySizes, make_tiny

    sizes = TinySizes(
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden_size=hidden_size,
        moe_intermediate_size=moe_intermediate_size,
        heads=heads,
        vocab_size=vocab_size,
        vision_layers=vision_layers,
        shards=shards,
    )
    try:
        make_tiny(folder, sizes, seed=seed)
    except (ConfigError, OSError, ValueError) as error:
        fail(error)
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB")
