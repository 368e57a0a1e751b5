"""`k26 tensors`, `k26 check` and `k26 tiny`: list a checkpoint's tensors, check that it is whole, make a small one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k26_plugins.cli.command import PATH, Argument, Command
from k26_plugins.cli.console import bytes_bar, fail, folder_argument, out, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from k26_plugins.common.checkpoint import Problem, TensorSpec


@click.command(cls=Command)
@click.argument("config", cls=Argument, type=PATH, metavar="CONFIG", about="A config.json, or a checkpoint's folder.")
@click.option("--all", "every", is_flag=True, help="A tab-separated line for every single tensor.")
def tensors(config: Path, every: bool) -> None:
    """Print the tensors that a configuration implies, with their sums.

    Reads the configuration only. Layers and experts that repeat are folded into one line unless --all is given.
    """
    from k26_plugins.common.checkpoint import tensor_table
    from k26_plugins.common.model.config import ConfigError, K26Config

    try:
        specs = list(tensor_table(K26Config.from_path(config)).values())
    except ConfigError as error:
        fail(error)
    if every:
        for spec in specs:
            cut = "-" if spec.shard_dim is None else str(spec.shard_dim)
            click.echo(f"{spec.name}\t{spec.dtype}\t{list(spec.shape)}\t{cut}\t{spec.num_bytes}")
    else:
        out().print(_folded_table(specs))
    total = sum(spec.num_bytes for spec in specs)
    click.echo(f"{len(specs):,} tensors, {total:,} bytes ({total / 2**30:.2f} GiB)")


def _folded_table(specs: list[TensorSpec]) -> Table:
    """Return the table of the tensors, with one line for tensors that differ only in their layer, expert or block."""
    from rich.table import Column, Table

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


@click.command(cls=Command)
@folder_argument
@click.option(
    "--hash", "hashes", is_flag=True, help="Read every byte too, and hold each file against the hub's hash of it."
)
@click.option("--manifest", type=PATH, metavar="FILE", help="The hashes, as `sha256sum` writes them; implies --hash.")
@click.option("--repair", is_flag=True, help="Print the commands that download just the bad files; implies --hash.")
def check(folder: Path, hashes: bool, manifest: Path | None, repair: bool) -> None:
    """Compare a checkpoint with its table of tensors: names, shapes, dtypes and file sizes.

    Faults of files are listed first, then faults of tensors, with one line for all of a kind in a layer. A checkpoint
    of this architecture in another layout (NVFP4, another quantization, a draft layer) is not damaged: an engine's own
    code serves it. Only headers are read, not weights, which takes seconds for the published 64 files. The command also
    says if the folder's chat template, which is the one that is used, renders a conversation differently from the one
    that ships with k26-plugins. Exits with 1 if something is wrong.

    --hash finds what headers cannot show, such as a flipped bit or a hole that a download left. The hashes are those
    that the hub's cache or `hf download --local-dir` keeps beside the files, or those of a manifest. Several files are
    read at a time. An interrupted run goes on where it was, because files that were right are remembered in
    ~/.cache/k26-plugins/verified.json as long as they keep their size, time and inode. --repair prints commands, and
    runs none.
    """
    from k26_plugins.common.checkpoint import CheckpointError, folded
    from k26_plugins.common.checkpoint import check as run_check
    from k26_plugins.common.model.config import ConfigError
    from k26_plugins.common.prompt.template_check import differing_samples

    contents = _contents(folder, manifest) if hashes or repair or manifest else []
    for line in folded(contents):
        out().print(line, highlight=False, markup=False, soft_wrap=True)
    with progress_bar() as progress:
        task = progress.add_task("reading headers")
        try:
            report = run_check(folder, lambda done, total: progress.update(task, completed=done, total=total))
        except (CheckpointError, ConfigError) as error:
            progress.stop()
            if repair:
                _print_repair(folder, contents)
            fail(error)
    said = {(problem.fault, problem.name) for problem in contents}
    report.problems = [problem for problem in report.problems if (problem.fault, problem.name) not in said]
    for line in folded(report.problems):
        out().print(line, highlight=False, markup=False, soft_wrap=True)
    sums = f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes in {report.num_files} files"
    if report.other_layout:
        click.echo(f"{sums}, this architecture in another layout, which an engine's own code serves:")
        for reason in report.other_layout:
            click.echo(f"  {reason}")
    else:
        click.echo(f"{sums} are right.")
    if differing := differing_samples(folder):
        click.echo(f"chat_template.jinja renders otherwise than the one that ships: {', '.join(differing)}.")
    problems = [*contents, *report.problems]
    if repair:
        _print_repair(folder, problems)
    if problems:
        fail(f"{len(problems):,} faults.")


def _contents(folder: Path, manifest: Path | None) -> list[Problem]:
    """Compare the files with their hashes, with a progress bar, and return what is wrong with them."""
    from k26_plugins.common.checkpoint import CheckpointError
    from k26_plugins.common.checkpoint.content import expected_contents, verify_contents
    from k26_plugins.common.checkpoint.verified import Verified

    verified = Verified()
    try:
        expected = expected_contents(folder, manifest)
    except CheckpointError as error:
        fail(error)
    files = [folder / one.name for one in expected]
    with bytes_bar() as progress:
        task = progress.add_task("hashing", total=sum(file.stat().st_size for file in files if file.is_file()))
        problems = verify_contents(folder, expected, verified, lambda count: progress.advance(task, count))
    known = f", {verified.num_known} of them in an earlier run ({verified.file})" if verified.num_known else ""
    click.echo(f"{len(expected) - len(problems)} of {len(expected)} files hold what they should{known}.")
    hashed = {one.name for one in expected}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in hashed:
            click.echo(f"{file.name} has no hash to hold it against.")
    return problems


def _print_repair(folder: Path, problems: list[Problem]) -> None:
    from k26_plugins.cli.plan import HUB_NAME
    from k26_plugins.common.checkpoint import Fault
    from k26_plugins.common.checkpoint.content import repair_commands

    bad = (Fault.MISSING_FILE, Fault.UNREADABLE, Fault.WRONG_CONTENT)
    names = sorted({problem.name for problem in problems if problem.fault in bad})
    for command in repair_commands(folder, names, HUB_NAME):
        click.echo(command)


@click.command(cls=Command)
@click.argument("folder", cls=Argument, type=PATH, metavar="DIR", about="A new folder.")
@click.option("--layers", default=3, help="Decoder layers; the first is dense.")
@click.option("--experts", default=8, help="Routed experts of a layer.")
@click.option("--top-k", default=2, help="Experts that a token goes to.")
@click.option("--hidden-size", default=128, help="A multiple of 64.")
@click.option("--moe-intermediate-size", default=64, help="Of one expert; a multiple of 32.")
@click.option("--heads", default=4, help="Attention heads.")
@click.option("--vocab-size", default=512, help="163840 gives the special tokens their published ids.")
@click.option("--vision-layers", default=2, help="Layers of the vision tower.")
@click.option("--shards", default=3, help="Weight files.")
@click.option("--seed", default=0, help="The same sizes and seed give the same bytes.")
@click.option(
    "--lora",
    type=PATH,
    metavar="OUT",
    help="Write LoRA adapters for it too, one of each way in which trainers name modules, as PEFT writes them.",
)
@click.option(
    "--eagle3",
    type=PATH,
    metavar="OUT",
    help="Write an Eagle3 draft for it too, in the layout of the published ones; needs five layers.",
)
def tiny(
    folder: Path,
    layers: int,
    experts: int,
    top_k: int,
    hidden_size: int,
    moe_intermediate_size: int,
    heads: int,
    vocab_size: int,
    vision_layers: int,
    shards: int,
    seed: int,
    lora: Path | None,
    eagle3: Path | None,
) -> None:
    """Write a small random checkpoint with exactly Kimi-K2.6's structure: a few MB, in seconds.

    Every engine can be tried with it without a GPU. Its answers are noise, but the same noise in every engine.
    """
    from k26_plugins.common.model.config import ConfigError
    from k26_plugins.common.tiny.adapter import make_adapters
    from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny
    from k26_plugins.common.tiny.draft import layers_read, make_eagle3

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
        if eagle3 is not None:
            layers_read(layers)
        make_tiny(folder, sizes, seed=seed)
        written = [folder]
        if lora is not None:
            written += make_adapters(folder, lora, seed=seed)
        if eagle3 is not None:
            make_eagle3(folder, eagle3, seed=seed)
            written.append(eagle3)
    except (ConfigError, OSError, ValueError) as error:
        fail(error)
    for made in written:
        size = sum(file.stat().st_size for file in made.iterdir())
        click.echo(f"{made}: {size / 1e6:.1f} MB")
