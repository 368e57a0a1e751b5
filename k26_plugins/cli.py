"""The command line `k26`. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    from k26_plugins.common.checkpoint import TensorSpec

app = typer.Typer(
    name="k26",
    help="Kimi-K2.6 for vLLM, SGLang and KTransformers: look at a checkpoint, make a small one, run the reference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.", show_default=False)]


def fail(error: Exception | str) -> NoReturn:
    err.print("[red]error:[/]", end=" ")
    err.print(str(error), highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)


@app.command()
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


@app.command()
def check(folder: Folder) -> None:
    """Hold a checkpoint against its table of tensors: names, shapes, dtypes and file sizes.

    Reads headers, not weights: seconds for the published 64 files. Exits with 1 where something is wrong.
    """
    from k26_plugins.common.checkpoint import CheckpointError
    from k26_plugins.common.checkpoint import check as run_check
    from k26_plugins.common.config import ConfigError

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("reading headers")
        try:
            report = run_check(folder, lambda done, total: progress.update(task, completed=done, total=total))
        except (CheckpointError, ConfigError) as error:
            progress.stop()
            fail(error)
    for problem in report.problems:
        out.print(f"{problem.fault}: {problem.name} {problem.message}", highlight=False, markup=False, soft_wrap=True)
    typer.echo(f"{report.num_tensors:,} tensors, {report.num_bytes:,} bytes in {report.num_files} files are right.")
    if report.problems:
        fail(f"{len(report.problems):,} faults.")


@app.command()
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
    except (ConfigError, FileExistsError, ValueError) as error:
        fail(error)
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB")


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="The user's message.", show_default=False)],
    image: Annotated[list[Path] | None, typer.Option(help="An image that comes before the text; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 32,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    thinking: Annotated[bool, typer.Option(help="Thinking mode, or instant.")] = True,
) -> None:
    """Answer a message with the plain reference model, on the CPU.

    Weights are read from the mapped files when they are touched, so that the published checkpoint works too, slowly.
    """
    import torch

    from k26_plugins.common.checkpoint import Checkpoint, CheckpointError
    from k26_plugins.common.config import ConfigError
    from k26_plugins.common.media import MediaConfig, MediaError, normalise, open_image, preprocess
    from k26_plugins.common.multimodal import KimiK26
    from k26_plugins.common.prompt.chat import expand_media_placeholders, render
    from k26_plugins.common.prompt.tokenizer import KimiTokenizer, TokenizerError

    try:
        checkpoint = Checkpoint(folder)
        tokenizer = KimiTokenizer(folder)
        tokenizer.check(checkpoint.config)
        media = [[open_image(path.read_bytes())] for path in image or []]
        parts: list[dict[str, str]] = [{"type": "image"} for _ in media]
        text = render(
            [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}], folder, thinking=thinking
        )
        token_ids = tokenizer.encode_prompt(text)
        pixel_values = grid_thw = None
        if media:
            media_config = MediaConfig.from_path(folder)
            patches, grids = preprocess(media, media_config)
            pixel_values = torch.from_numpy(normalise(patches, media_config))
            grid_thw = torch.from_numpy(grids)
            counts = [h * w // media_config.merge_kernel_size**2 for _, h, w in grids.tolist()]
            placeholder = checkpoint.config.media_placeholder_token_id
            token_ids = expand_media_placeholders(token_ids, counts, placeholder)
        with err.status("reading the checkpoint"):
            model = KimiK26(checkpoint)
    except (CheckpointError, ConfigError, MediaError, TokenizerError, OSError) as error:
        fail(error)
    answer: list[int] = []
    printed = 0
    for token in model.generate(
        torch.tensor(token_ids),
        pixel_values,
        grid_thw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        answer.append(token)
        whole = tokenizer.decode(answer)
        # A character may take several tokens: what does not decode yet waits.
        if not whole.endswith("\ufffd"):
            typer.echo(whole[printed:], nl=False)
            printed = len(whole)
    typer.echo(tokenizer.decode(answer)[printed:])


@app.command()
def media(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An image or a video.", show_default=False)],
    sheet: Annotated[Path | None, typer.Option(help="Where the picture goes. [default: FILE-k26.png, here]")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Take its preprocessor_config.json. [default: the published settings]")
    ] = None,
) -> None:
    """Show what the model sees of an image or a video: frames, grid of patches, tokens, and a picture of the frames.

    Width and height of the picture's frames are those that the model gets, padding included, shrunk to 320 pixels.
    """
    from k26_plugins.common.contact_sheet import Frame, contact_sheet, thumbnail, unpatchify
    from k26_plugins.common.media import MediaConfig, MediaError, open_image, preprocess
    from k26_plugins.common.video import read_chunks

    target = sheet or Path(f"{file.stem}-k26.png")
    table = Table("", "frames", "grid t × h × w", "tokens")
    frames: list[Frame] = []
    total = 0
    try:
        config = MediaConfig() if checkpoint is None else MediaConfig.from_path(checkpoint)
        data = file.read_bytes()
        try:
            patches, grids = preprocess([[open_image(data)]], config)
        except MediaError as not_an_image:
            try:
                for chunk in read_chunks(data, config):
                    _, grid_h, grid_w = chunk.grid_thw
                    table.add_row(
                        chunk.timestamp,
                        ", ".join(map(str, chunk.indices)),
                        f"{len(chunk.indices)} × {grid_h} × {grid_w}",
                        str(chunk.num_tokens),
                    )
                    total += chunk.num_tokens
                    for index, pixels in zip(chunk.indices, unpatchify(chunk.patches, chunk.grid_thw), strict=True):
                        frames.append(thumbnail(pixels, f"{chunk.timestamp}  #{index}"))
            except MediaError as not_a_video:
                fail(f"{file} as an image: {not_an_image} As a video: {not_a_video}")
        else:
            _, grid_h, grid_w = (int(size) for size in grids[0])
            total = grid_h * grid_w // config.merge_kernel_size**2
            table.add_row("image", "1", f"1 × {grid_h} × {grid_w}", str(total))
            frames.append(thumbnail(unpatchify(patches, (1, grid_h, grid_w))[0], file.name))
        contact_sheet(frames).save(target)
    except (MediaError, OSError) as error:
        fail(error)
    out.print(table)
    typer.echo(f"{len(frames):,} frames, {total:,} tokens; picture: {target}")
